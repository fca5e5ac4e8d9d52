//! What the kernel tells of this machine and of the threads of this process.

/// Bytes of memory that can be taken without making others swap, if the kernel tells.
pub fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    number_after(&text, "MemAvailable:")?.checked_mul(1024)
}

/// Times that a thread of this process gave its CPU up, and that it was taken away.
pub fn context_switches(thread: u64) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
    let number = |name| u64::try_from(number_after(&text, name)?).ok();
    Some((
        number("\nvoluntary_ctxt_switches:")?,
        number("\nnonvoluntary_ctxt_switches:")?,
    ))
}

fn number_after(text: &str, name: &str) -> Option<usize> {
    let (_, rest) = text.split_once(name)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_of_memory_and_of_this_thread() {
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
        let thread = nix::unistd::gettid().as_raw().try_into().unwrap();
        assert!(context_switches(thread).is_some());
        assert_eq!(context_switches(0), None);
    }

    #[test]
    fn numbers_are_found_by_their_whole_names() {
        let text = "a:\t1 kB\nvoluntary:\t7\nnonvoluntary:\t8\n";
        assert_eq!(number_after(text, "\nvoluntary:"), Some(7));
        assert_eq!(number_after(text, "\nnonvoluntary:"), Some(8));
        assert_eq!(number_after(text, "b:"), None);
    }
}
