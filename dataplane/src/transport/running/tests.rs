use super::*;
use crate::mem::Iova;
use crate::transport::fake::{Asked, DEVICE, FakeCores, stopped};

fn setup() -> QueueSetup {
    QueueSetup {
        kind: QueueKind::Request,
        config: QueueConfig {
            size: 8,
            desc: Iova(0),
            avail: Iova(0),
            used: Iova(0),
            packed: false,
            event_idx: false,
            indirect: false,
            state: QueueState::default(),
        },
        kick: Arc::new(EventFd::new().unwrap()),
        call: None,
        inflight: None,
    }
}

fn two_running() -> (RunningQueues, FakeCores) {
    let mut cores = FakeCores::default();
    let mut queues = RunningQueues::new(DEVICE, 3);
    for index in 0..2 {
        queues.start(QueueIdx(index), setup(), &mut cores);
    }
    assert_eq!(cores.take(), [Asked::Start(0), Asked::Start(1)]);
    (queues, cores)
}

const REPLACED: CoreEvent = CoreEvent::MemoryReplaced { device: DEVICE };

#[test]
fn a_stopped_queue_tells_where_it_stands() {
    let (mut queues, mut cores) = two_running();
    assert!(!queues.stop(QueueIdx(1), &mut cores));
    assert_eq!(cores.take(), [Asked::Stop(1)]);
    assert!(!queues.stop(QueueIdx(1), &mut cores), "still on its way");
    assert_eq!(cores.take(), []);
    let notice = queues.event(stopped(1, 5, 5), &mut cores);
    assert_eq!(notice, Some(Notice::Stopped(QueueIdx(1))));
    assert_eq!(queues.state(QueueIdx(1)).avail, 5);
    assert!(queues.stop(QueueIdx(1), &mut cores));
    assert!(queues.stop(QueueIdx(99), &mut cores));
}

#[test]
fn a_pause_keeps_positions_and_a_resume_goes_on_there_with_a_kick() {
    let (mut queues, mut cores) = two_running();
    queues.pause(&mut cores);
    assert_eq!(cores.take(), [Asked::Stop(0), Asked::Stop(1)]);
    assert_eq!(queues.event(stopped(0, 3, 3), &mut cores), None);
    assert!(!queues.is_paused());
    assert_eq!(queues.event(stopped(1, 9, 8), &mut cores), None);
    assert!(queues.is_paused());
    // What the driver asks for meanwhile is done afterwards.
    queues.start(QueueIdx(2), setup(), &mut cores);
    assert!(queues.stop(QueueIdx(0), &mut cores));
    assert_eq!(cores.take(), []);
    queues.resume(&mut cores);
    assert_eq!(cores.take(), [Asked::Start(1), Asked::Start(2)]);
    assert!(!queues.is_paused());
    let again = &cores.started[2];
    assert_eq!((again.config.state.avail, again.config.state.used), (9, 8));
    assert_eq!(nix::unistd::read(&*again.kick, &mut [0; 8]), Ok(8));
}

#[test]
fn a_resume_before_the_pause_is_complete_restarts_what_stops() {
    let (mut queues, mut cores) = two_running();
    queues.pause(&mut cores);
    queues.resume(&mut cores);
    cores.take();
    assert_eq!(queues.event(stopped(0, 7, 7), &mut cores), None);
    assert_eq!(cores.take(), [Asked::Start(0)]);
    assert_eq!(cores.started[2].config.state.avail, 7);
}

#[test]
fn a_reset_ends_the_session_once_everything_is_out() {
    let (mut queues, mut cores) = two_running();
    assert!(!queues.stop(QueueIdx(0), &mut cores));
    assert!(!queues.set_memory(Arc::default(), &mut cores));
    cores.take();
    assert!(!queues.reset(&mut cores));
    assert_eq!(cores.take(), [Asked::Reset(0), Asked::Reset(1)]);
    assert!(!queues.is_quiet());
    assert_eq!(queues.event(stopped(0, 1, 1), &mut cores), None);
    assert_eq!(queues.event(stopped(1, 1, 1), &mut cores), None);
    let failed = CoreEvent::QueueFailed {
        device: DEVICE,
        index: QueueIdx(1),
    };
    assert_eq!(queues.event(failed, &mut cores), None);
    assert_eq!(cores.take(), []);
    assert_eq!(queues.event(REPLACED, &mut cores), Some(Notice::ResetDone));
    assert_eq!(cores.take(), [Asked::EndSession]);
    assert!(queues.is_quiet());
    assert_eq!(queues.state(QueueIdx(0)), QueueState::default());
    assert!(queues.reset(&mut cores), "nothing runs");
    assert_eq!(cores.take(), [Asked::EndSession]);
}

#[test]
fn a_reset_while_paused_leaves_the_device_paused() {
    let (mut queues, mut cores) = two_running();
    queues.pause(&mut cores);
    queues.event(stopped(0, 1, 1), &mut cores);
    queues.event(stopped(1, 1, 1), &mut cores);
    assert!(queues.reset(&mut cores));
    cores.take();
    assert!(queues.is_paused());
    queues.start(QueueIdx(0), setup(), &mut cores);
    assert_eq!(cores.take(), []);
    queues.resume(&mut cores);
    assert_eq!(cores.take(), [Asked::Start(0)]);
}

#[test]
fn memory_changes_at_once_when_nothing_runs_and_is_awaited_otherwise() {
    let mut cores = FakeCores::default();
    let mut queues = RunningQueues::new(DEVICE, 1);
    assert!(queues.set_memory(Arc::default(), &mut cores));
    assert_eq!(cores.take(), []);
    let (mut queues, mut cores) = two_running();
    assert!(!queues.set_memory(Arc::default(), &mut cores));
    assert_eq!(cores.take(), [Asked::SetMemory]);
    assert_eq!(
        queues.event(REPLACED, &mut cores),
        Some(Notice::MemoryReplaced)
    );
}

#[test]
fn a_setup_that_changes_while_the_queue_runs_takes_over_where_it_stands() {
    let (mut queues, mut cores) = two_running();
    queues.start(QueueIdx(0), setup(), &mut cores);
    assert_eq!(cores.take(), [Asked::Stop(0)]);
    assert_eq!(queues.event(stopped(0, 4, 4), &mut cores), None);
    assert_eq!(cores.take(), [Asked::Start(0)]);
    assert_eq!(cores.started[2].config.state.avail, 4);
}

#[test]
fn interrupts_move_for_running_and_for_paused_queues() {
    let (mut queues, mut cores) = two_running();
    let call = Some(Arc::new(EventFd::new().unwrap()));
    queues.set_call(QueueIdx(0), call.clone(), &mut cores);
    assert_eq!(cores.take(), [Asked::SetCall(0, true)]);
    queues.pause(&mut cores);
    queues.event(stopped(0, 0, 0), &mut cores);
    queues.event(stopped(1, 0, 0), &mut cores);
    queues.set_call(QueueIdx(1), call, &mut cores);
    queues.resume(&mut cores);
    assert!(cores.started[2..].iter().all(|s| s.call.is_some()));
}

#[test]
fn a_queue_that_is_to_be_placed_anew_stops_where_it_stands_and_goes_on_there() {
    let (mut queues, mut cores) = two_running();
    queues.start_again(QueueIdx(1), &mut cores);
    assert_eq!(cores.take(), [Asked::Stop(1)]);
    // It is on its way already, and what does not run is not placed.
    for index in [1, 2, 99] {
        queues.start_again(QueueIdx(index), &mut cores);
    }
    assert_eq!(cores.take(), []);
    assert_eq!(queues.event(stopped(1, 6, 5), &mut cores), None);
    assert_eq!(cores.take(), [Asked::Start(1)]);
    let again = &cores.started[2];
    assert_eq!((again.config.state.avail, again.config.state.used), (6, 5));
}

#[test]
fn a_pause_a_stop_and_a_reset_win_over_a_queue_that_is_being_placed() {
    let (mut queues, mut cores) = two_running();
    queues.start_again(QueueIdx(0), &mut cores);
    queues.pause(&mut cores);
    cores.take();
    assert_eq!(queues.event(stopped(0, 4, 4), &mut cores), None);
    assert_eq!(queues.event(stopped(1, 2, 2), &mut cores), None);
    assert!(queues.is_paused());
    assert_eq!(cores.take(), []);

    let (mut queues, mut cores) = two_running();
    queues.start_again(QueueIdx(0), &mut cores);
    assert!(!queues.stop(QueueIdx(0), &mut cores));
    cores.take();
    let notice = queues.event(stopped(0, 4, 4), &mut cores);
    assert_eq!(notice, Some(Notice::Stopped(QueueIdx(0))));
    assert_eq!(cores.take(), []);

    let (mut queues, mut cores) = two_running();
    queues.start_again(QueueIdx(0), &mut cores);
    assert!(!queues.reset(&mut cores));
    assert_eq!(queues.event(stopped(1, 0, 0), &mut cores), None);
    let notice = queues.event(stopped(0, 4, 4), &mut cores);
    assert_eq!(notice, Some(Notice::ResetDone));
}

#[test]
fn a_device_that_is_held_runs_nothing_until_it_is_let_go_and_not_paused() {
    let mut cores = FakeCores::default();
    let mut queues = RunningQueues::held(DEVICE, 1);
    queues.start(QueueIdx(0), setup(), &mut cores);
    queues.pause(&mut cores);
    queues.hold(false, &mut cores);
    assert_eq!(cores.take(), []);
    queues.resume(&mut cores);
    assert_eq!(cores.take(), [Asked::Start(0)]);
    queues.hold(true, &mut cores);
    queues.hold(true, &mut cores);
    assert_eq!(cores.take(), [Asked::Stop(0)]);
    queues.event(stopped(0, 3, 3), &mut cores);
    queues.resume(&mut cores);
    assert_eq!(cores.take(), []);
    queues.hold(false, &mut cores);
    assert_eq!(cores.take(), [Asked::Start(0)]);
    assert_eq!(cores.started[1].config.state.avail, 3);
}
