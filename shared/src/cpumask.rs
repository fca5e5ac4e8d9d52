//! CPU masks, as SPDK's tools write them: `0x3`, `3` (hexadecimal) or `[0,2-3]`.

use std::fmt;
use std::str::FromStr;

/// Highest CPU number, plus one.
const MAX_CPUS: u32 = 1024;

/// A non-empty set of CPU numbers, in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuMask(Vec<u32>);

impl CpuMask {
    /// The CPU numbers.
    pub fn cpus(&self) -> Vec<u32> {
        self.0.clone()
    }
}

impl fmt::Display for CpuMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (n, cpu) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{cpu}")?;
        }
        f.write_str("]")
    }
}

impl FromStr for CpuMask {
    type Err = String;

    fn from_str(text: &str) -> Result<CpuMask, String> {
        let list = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        let mut cpus = match list {
            Some(list) => parse_list(list)?,
            None => parse_mask(text)?,
        };
        cpus.sort_unstable();
        cpus.dedup();
        if cpus.is_empty() {
            return Err("the mask names no CPU".into());
        }
        Ok(CpuMask(cpus))
    }
}

fn parse_list(list: &str) -> Result<Vec<u32>, String> {
    let number = |t: &str| {
        let n: u32 = t
            .trim()
            .parse()
            .map_err(|_| format!("{t:?} is not a CPU number"))?;
        if n < MAX_CPUS {
            Ok(n)
        } else {
            Err(format!("CPU {n} is above {}", MAX_CPUS - 1))
        }
    };
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high) = (number(low)?, number(high)?);
        if low > high {
            return Err(format!("range {part:?} runs backwards"));
        }
        cpus.extend(low..=high);
    }
    Ok(cpus)
}

fn parse_mask(text: &str) -> Result<Vec<u32>, String> {
    let digits = text
        .strip_prefix("0x")
        .or_else(|| text.strip_prefix("0X"))
        .unwrap_or(text);
    let mut cpus = Vec::new();
    for (place, digit) in digits.chars().rev().enumerate() {
        let bits = digit.to_digit(16).ok_or_else(|| {
            format!("{text:?} is not a hexadecimal mask, nor a list like [0,2-3]")
        })?;
        let base = u32::try_from(place).unwrap_or(MAX_CPUS).saturating_mul(4);
        for bit in (0..4).filter(|b| bits & (1 << b) != 0) {
            let cpu = base.saturating_add(bit);
            if cpu >= MAX_CPUS {
                return Err(format!("CPU {cpu} is above {}", MAX_CPUS - 1));
            }
            cpus.push(cpu);
        }
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_lists_name_the_same_cpus() {
        for (text, cpus) in [
            ("0x1", vec![0]),
            ("3", vec![0, 1]),
            ("0xF0", vec![4, 5, 6, 7]),
            ("[0,2-3]", vec![0, 2, 3]),
            ("[5]", vec![5]),
            ("0x10000000000000001", vec![0, 64]),
        ] {
            assert_eq!(
                text.parse::<CpuMask>().map(|m| m.cpus()),
                Ok(cpus),
                "{text}"
            );
        }
    }

    #[test]
    fn bad_masks_are_refused() {
        for text in [
            "", "0x", "0", "0x0", "[]", "[3-1]", "[a]", "zz", "[1024]", "[0,]",
        ] {
            assert!(text.parse::<CpuMask>().is_err(), "{text}");
        }
    }
}
