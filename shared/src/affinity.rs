//! Where threads run that are not cores: elsewhere, as far as there is another CPU.

use nix::Result;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The CPUs that a thread was given when it began.
#[derive(Clone, Copy, Debug)]
pub struct Allowed(CpuSet);

impl Allowed {
    /// Those of the calling thread.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn now() -> Result<Allowed> {
        sched_getaffinity(Pid::from_raw(0)).map(Allowed)
    }

    /// These CPUs less those of the cores; all of them where the cores leave none.
    fn less(&self, cores: &[u32]) -> CpuSet {
        let is_left = |cpu: &usize| {
            let core = u32::try_from(*cpu).is_ok_and(|cpu| cores.contains(&cpu));
            !core && self.0.is_set(*cpu) == Ok(true)
        };
        let mut rest = CpuSet::new();
        let mut any = false;
        for cpu in (0..CpuSet::count()).filter(is_left) {
            any |= rest.set(cpu).is_ok();
        }
        if any { rest } else { self.0 }
    }

    /// Has the calling thread, and what it starts from now on, leave the CPUs of these cores alone.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn keep_off(&self, cores: &[u32]) -> Result<()> {
        sched_setaffinity(Pid::from_raw(0), &self.less(cores))
    }
}

#[cfg(test)]
mod tests {
    use super::Allowed;
    use nix::sched::CpuSet;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        for cpu in cpus {
            set.set(*cpu).expect("a small number");
        }
        set
    }

    #[test]
    fn what_the_cores_leave_is_used_and_everything_where_they_leave_nothing() {
        let allowed = Allowed(set(&[0, 1, 5]));
        assert_eq!(allowed.less(&[0, 2]), set(&[1, 5]));
        assert_eq!(allowed.less(&[]), set(&[0, 1, 5]));
        assert_eq!(allowed.less(&[0, 1, 5]), set(&[0, 1, 5]));
    }

    #[test]
    fn a_thread_moves_and_comes_back_when_the_cores_are_others() {
        // On a thread of its own: the test runner's are not to be moved.
        let moved = std::thread::spawn(|| {
            let allowed = Allowed::now().expect("an affinity");
            let first = (0..CpuSet::count()).find(|cpu| allowed.0.is_set(*cpu) == Ok(true));
            let first = u32::try_from(first.expect("a CPU")).expect("a small number");
            allowed.keep_off(&[first]).expect("may move");
            let away = Allowed::now().expect("an affinity").0;
            assert_eq!(away, allowed.less(&[first]));
            allowed.keep_off(&[]).expect("may move");
            assert_eq!(Allowed::now().expect("an affinity").0, allowed.0);
        });
        moved.join().expect("no panic");
    }
}
