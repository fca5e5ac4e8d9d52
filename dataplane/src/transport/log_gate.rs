//! Keeps what a peer does from flooding the log.

use std::time::{Duration, Instant};

/// Lines that a device may log in one [`WINDOW`].
const LINES: u32 = 20;
/// How long the count goes on before it begins anew.
const WINDOW: Duration = Duration::from_secs(10);

/// Counts the lines that a device's peer has caused.
#[derive(Debug)]
pub(crate) struct LogGate {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl LogGate {
    pub(crate) fn new(now: Instant) -> LogGate {
        LogGate {
            since: now,
            lines: 0,
            left_out: 0,
        }
    }

    /// Whether a line may be logged now, and then how many have been left out before it.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= WINDOW {
            self.since = now;
            self.lines = 0;
        }
        if self.lines >= LINES {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted_until_the_next_window() {
        let start = Instant::now();
        let mut gate = LogGate::new(start);
        for _ in 0..LINES {
            assert_eq!(gate.admit(start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(gate.admit(start), None);
        }
        assert_eq!(gate.admit(start + WINDOW), Some(3));
        assert_eq!(gate.admit(start + WINDOW), Some(0));
    }
}
