//! The dynamic scheduler's decisions: which queue moves from a busy core to an idle one. Pure; the loads come from outside.

use ferry_shared::tuning::Balance;

use super::placement::QueueName;

/// A move must make the busier of the two cores less busy by this many per cent, or it is not worth the pause.
const GAIN: u32 = 5;

/// What a queue has taken of its core's time, in per cent.
#[derive(Clone, Debug)]
pub(super) struct QueueLoad {
    pub(super) queue: QueueName,
    pub(super) core: usize,
    pub(super) percent: u32,
    /// Cores that may serve it.
    pub(super) allowed: Vec<usize>,
}

/// Which queue should go to which core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) queue: QueueName,
    pub(super) to: usize,
}

/// The moves that make busy cores less busy. `cores` are their loads in per cent.
pub(super) fn plan(mut cores: Vec<u32>, mut queues: Vec<QueueLoad>, limits: &Balance) -> Vec<Move> {
    let mut moves = Vec::new();
    queues.retain(|queue| queue.percent >= u32::from(limits.load_limit));
    // The largest first: moving one large queue disturbs less than moving many.
    queues.sort_by_key(|queue| core::cmp::Reverse(queue.percent));
    for queue in queues {
        let load = |core: usize| cores.get(core).copied().unwrap_or(u32::MAX);
        let here = load(queue.core);
        if here < u32::from(limits.core_limit) {
            continue;
        }
        let others = queue
            .allowed
            .iter()
            .copied()
            .filter(|&core| core != queue.core);
        let Some(to) = others.min_by_key(|&core| load(core)) else {
            continue;
        };
        let there = load(to).saturating_add(queue.percent);
        let better = there.saturating_add(GAIN) <= here;
        if !better || there > u32::from(limits.core_busy) {
            continue;
        }
        if let Some(from) = cores.get_mut(queue.core) {
            *from = from.saturating_sub(queue.percent);
        }
        if let Some(target) = cores.get_mut(to) {
            *target = there;
        }
        moves.push(Move {
            queue: queue.queue,
            to,
        });
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{DeviceId, QueueIdx};

    fn load(index: u16, core: usize, percent: u32) -> QueueLoad {
        QueueLoad {
            queue: (DeviceId(1), QueueIdx(index)),
            core,
            percent,
            allowed: vec![0, 1],
        }
    }

    fn moved(cores: &[u32], queues: Vec<QueueLoad>) -> Vec<(u16, usize)> {
        let moves = plan(cores.to_vec(), queues, &Balance::default());
        moves.iter().map(|m| (m.queue.1.0, m.to)).collect()
    }

    #[test]
    fn a_busy_core_gives_queues_to_an_idle_one() {
        let queues = vec![load(1, 0, 45), load(2, 0, 50), load(3, 0, 3)];
        assert_eq!(moved(&[98, 0], queues), [(2, 1)]);
    }

    #[test]
    fn one_queue_alone_stays_and_so_do_those_of_a_core_with_room() {
        assert_eq!(moved(&[98, 0], vec![load(1, 0, 98)]), []);
        let queues = vec![load(1, 0, 35), load(2, 0, 40)];
        assert_eq!(moved(&[75, 0], queues), []);
    }

    #[test]
    fn nothing_goes_where_it_would_be_as_bad_or_is_not_allowed() {
        let queues = vec![load(1, 0, 50), load(2, 0, 48)];
        assert_eq!(moved(&[98, 60], queues.clone()), []);
        let bound = queues.into_iter().map(|queue| QueueLoad {
            allowed: vec![0],
            ..queue
        });
        assert_eq!(moved(&[98, 0], bound.collect()), []);
    }

    #[test]
    fn queues_spread_over_all_idle_cores() {
        let all = |index| QueueLoad {
            allowed: vec![0, 1, 2, 3],
            ..load(index, 0, 25)
        };
        let moves = plan(
            vec![100, 0, 0, 0],
            (1..=4).map(all).collect(),
            &Balance::default(),
        );
        let to: Vec<usize> = moves.iter().map(|m| m.to).collect();
        assert_eq!(to, [1], "what is left is below the limit of a core");
        let eager = Balance {
            core_limit: 30,
            ..Balance::default()
        };
        let moves = plan(vec![100, 0, 0, 0], (1..=4).map(all).collect(), &eager);
        let to: Vec<usize> = moves.iter().map(|m| m.to).collect();
        assert_eq!(to, [1, 2, 3]);
    }
}
