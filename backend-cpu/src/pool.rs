//! The threads of a device.
//!
//! A program is handed to the team once, under a lock, and its phases follow each other: no fork, join or allocation per
//! operation, and no lock as long as there is work to be had (a member without any sleeps, after a while, until there
//! is). Nor is there an allocation per program (rayon's `broadcast` makes one, and costs 1 to 16 µs where a phase here
//! costs less than 1 µs).
//!
//! A phase ends when its *tasks* are done, not when all members have arrived: who was late, because the system
//! gave its core to somebody else, finds the phase over and catches up, and who comes after the last phase does
//! not enter at all. So only work is ever waited for.

use crate::kernels::Scratch;
use backend_api::Step;
use std::{
    any::Any,
    collections::TryReserveError,
    hint, io,
    ops::{Deref, Range},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

/// Threads that work on one job at a time: the caller's, which is member 0, and those of the team.
pub(crate) struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What members work on together.
pub(crate) trait Job: Send + Sync {
    /// The part of one member. All members go through the same phases.
    fn work(&self, member: &mut Member<'_>, order: &Order) -> Result<(), Poisoned>;
}

/// What a job is to do this time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) step: Step,
    /// When it began, if operations are to be timed.
    pub(crate) timed_since: Option<Instant>,
}

/// What the threads of a team share.
struct Shared {
    /// Held while a job is done: programs of one device take turns.
    turn: Mutex<()>,
    /// One for each member, which locks it once per job. Nobody else does but with the turn.
    scratch: Vec<Mutex<Scratch>>,
    progress: Progress,
    hand: Mutex<Hand>,
    /// Counts the jobs handed out; the same as `Hand::number`, to wait for without the lock.
    number: Line<AtomicU64>,
    /// Members that hold the job, besides the caller.
    inside: AtomicUsize,
    /// The first fault of a job, or the message of a panic.
    fault: Mutex<Option<String>>,
}

/// How a job gets from the caller to the other members.
#[derive(Default)]
struct Hand {
    number: u64,
    /// None between jobs.
    job: Option<(Arc<dyn Job>, Order)>,
    /// The team is dropped.
    closed: bool,
}

/// Alone on its cache lines (two: processors fetch them in pairs), so that who writes it disturbs nobody else.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

impl<T> Deref for Line<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// One thread in [`Turn::run`].
pub(crate) struct Member<'a> {
    team: &'a Shared,
    scratch: &'a mut Scratch,
    /// The phases behind it.
    phase: u32,
}

/// The turn of whoever holds it: nothing runs on the team meanwhile.
pub(crate) struct Turn<'a> {
    team: &'a Shared,
    _guard: MutexGuard<'a, ()>,
}

/// Another member has panicked.
#[derive(Debug)]
pub(crate) struct Poisoned;

impl Team {
    pub(crate) fn new(name: &str, threads: usize) -> io::Result<Team> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            turn: Mutex::default(),
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            progress: Progress::default(),
            hand: Mutex::default(),
            number: Line::default(),
            inside: AtomicUsize::new(0),
            fault: Mutex::default(),
        });
        // Where a thread does not start, dropping the team ends those that did.
        let mut team = Team { shared, threads: Vec::new() };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            // The system's names end at a NUL, which the device's may have inside.
            let builder = thread::Builder::new().name(format!("{name}-{index}").replace('\0', " "));
            team.threads.push(builder.spawn(move || shared.serve(index))?);
        }
        Ok(team)
    }

    pub(crate) fn threads(&self) -> usize {
        self.shared.threads()
    }

    /// Gives every member at least `bytes` of scratch, once no job is under way.
    ///
    /// # Errors
    /// There is no room for all.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<(), TryReserveError> {
        let _turn = self.turn();
        self.shared.scratch.iter().try_for_each(|scratch| lock(scratch).reserve(bytes))
    }

    /// Waits until no job is under way.
    pub(crate) fn turn(&self) -> Turn<'_> {
        Turn { team: &self.shared, _guard: lock(&self.shared.turn) }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.hand_out(Hand { closed: true, ..Hand::default() });
        for thread in self.threads.drain(..) {
            // It has nothing to tell: panics of jobs are caught.
            drop(thread.join());
        }
    }
}

impl Turn<'_> {
    /// Does `job` with all members and returns when nobody is at it any more.
    ///
    /// # Errors
    /// The first fault that one of them found, or the message of its panic.
    pub(crate) fn run(&self, job: &Arc<impl Job + 'static>, order: Order) -> Result<(), String> {
        let team = self.team;
        team.progress.reset();
        if team.threads() > 1 {
            let job = Arc::clone(job) as Arc<dyn Job>;
            team.hand_out(Hand { job: Some((job, order)), ..Hand::default() });
        }
        team.take_part(0, job.as_ref(), &order);
        if team.threads() > 1 {
            lock(&team.hand).job = None;
            team.progress.wait_until(|| team.inside.load(Ordering::SeqCst) == 0);
        }
        lock(&team.fault).take().map_or(Ok(()), Err)
    }
}

impl Shared {
    fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Numbers what is handed out, and wakes the members.
    fn hand_out(&self, next: Hand) {
        let mut hand = lock(&self.hand);
        let number = hand.number + 1;
        *hand = Hand { number, ..next };
        drop(hand);
        self.number.store(number, Ordering::SeqCst);
        self.progress.wake_sleepers();
    }

    /// The life of a member that is not the caller.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.progress.wait_until(|| self.number.load(Ordering::SeqCst) != seen);
            let hand = lock(&self.hand);
            seen = hand.number;
            if hand.closed {
                return;
            }
            let Some((job, order)) = hand.job.clone() else { continue };
            // Before the caller can take the job back, which it does under this lock.
            self.inside.fetch_add(1, Ordering::SeqCst);
            drop(hand);
            self.take_part(index, job.as_ref(), &order);
            // The job is dropped by its caller, and never here.
            drop(job);
            self.inside.fetch_sub(1, Ordering::SeqCst);
            self.progress.wake_sleepers();
        }
    }

    fn take_part(&self, index: usize, job: &dyn Job, order: &Order) {
        let mut scratch = lock(&self.scratch[index]);
        let mut member = Member { team: self, scratch: &mut scratch, phase: 0 };
        // A member that left without telling would let the others wait for ever.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.work(&mut member, order))) {
            lock(&self.fault).get_or_insert_with(|| message(panic.as_ref()));
            self.progress.poison();
        }
        if let Some(fault) = scratch.take_fault() {
            lock(&self.fault).get_or_insert(fault);
        }
    }
}

impl Member<'_> {
    /// Shares out the tasks `0..tasks` and returns when all are done, by whomever. Whoever does the last calls
    /// `finish` before anything of the next phase begins; not so for a phase without tasks, which is none.
    ///
    /// # Errors
    /// If a member has panicked.
    pub(crate) fn phase(
        &mut self,
        tasks: usize,
        mut task: impl FnMut(usize, &mut Scratch),
        finish: impl FnOnce(),
    ) -> Result<(), Poisoned> {
        let Member { team, scratch, phase } = self;
        if tasks == 0 {
            return Ok(());
        }
        if team.threads() == 1 {
            (0..tasks).for_each(|index| task(index, scratch));
            finish();
            return Ok(());
        }
        let mut done = 0;
        while let Some(claimed) = team.progress.claim(*phase, tasks, team.threads()) {
            done += claimed.len();
            claimed.for_each(|index| task(index, scratch));
        }
        let outcome = team.progress.complete(*phase, done, tasks, finish);
        *phase += 1;
        outcome
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic leaves behind (scratch bytes, a turn) needs no repair.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic").to_owned()
}

/// The phase that the members are in, and what of it is claimed and done.
#[derive(Default)]
struct Progress {
    /// The phase in the high half, its next task in the low half: a late member that tried to claim a task of a
    /// phase that is over fails, because both are compared at once.
    at: Line<AtomicU64>,
    /// Tasks done in this phase, as far as members have told.
    done: Line<AtomicUsize>,
    poisoned: Line<AtomicBool>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Progress {
    /// About 5 µs: most tasks of a phase end together.
    const SPINS: usize = 200;
    /// About 50 µs on an idle machine; on a busy one each lets somebody else run.
    const YIELDS: usize = 100;

    /// Back to the first phase. Only while no member is inside.
    fn reset(&self) {
        self.at.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.poisoned.store(false, Ordering::Relaxed);
    }

    /// Some neighbouring tasks of `phase`, if there are any left: many at first, since neighbours mostly read memory
    /// that lies behind each other's, which processors foresee; at last one at a time, so that all end together.
    fn claim(&self, phase: u32, tasks: usize, threads: usize) -> Option<Range<usize>> {
        let mut at = self.at.load(Ordering::Acquire);
        loop {
            let (now, index) = ((at >> 32) as u32, at as u32 as usize);
            if now != phase || index >= tasks {
                return None;
            }
            let count = ((tasks - index) / (2 * threads)).max(1);
            match self.at.compare_exchange_weak(at, at + count as u64, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(index..index + count),
                Err(found) => at = found,
            }
        }
    }

    /// Tells that `done` tasks of `phase` are done, and returns when all are.
    fn complete(&self, phase: u32, done: usize, tasks: usize, finish: impl FnOnce()) -> Result<(), Poisoned> {
        // AcqRel: what each member wrote is seen by the one that completes the phase, and through `at` by all.
        // Who has done nothing must not touch the count, which may be that of a later phase.
        if done > 0 && self.done.fetch_add(done, Ordering::AcqRel) + done == tasks {
            finish();
            self.done.store(0, Ordering::Relaxed);
            self.at.store(u64::from(phase + 1) << 32, Ordering::SeqCst);
            self.wake_sleepers();
        } else {
            self.wait_until(|| {
                (self.at.load(Ordering::SeqCst) >> 32) as u32 != phase || self.poisoned.load(Ordering::SeqCst)
            });
        }
        if self.poisoned.load(Ordering::Relaxed) { Err(Poisoned) } else { Ok(()) }
    }

    /// Lets everybody go, now and until [`Progress::reset`].
    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
        self.wake_sleepers();
    }

    fn wait_until(&self, released: impl Fn() -> bool) {
        for _ in 0..Self::SPINS {
            if released() {
                return;
            }
            hint::spin_loop();
        }
        for _ in 0..Self::YIELDS {
            if released() {
                return;
            }
            thread::yield_now();
        }
        // Either the releaser sees this sleeper, or this sleeper sees the release (both SeqCst); and the lock is
        // free again only when the sleeper is inside `Condvar::wait`.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = lock(&self.lock);
        while !released() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.lock));
            self.wake.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::Step;
    use std::time::Duration;

    /// A job without a program.
    struct Body<F>(F);

    impl<F: Fn(&mut Member<'_>) -> Result<(), Poisoned> + Send + Sync> Job for Body<F> {
        fn work(&self, member: &mut Member<'_>, _: &Order) -> Result<(), Poisoned> {
            (self.0)(member)
        }
    }

    fn run(
        team: &Team,
        body: impl Fn(&mut Member<'_>) -> Result<(), Poisoned> + Send + Sync + 'static,
    ) -> Result<(), String> {
        let order = Order { step: Step { rows: 1, past: 0, outputs: 1 }, timed_since: None };
        let job = Arc::new(Body(body));
        let outcome = team.turn().run(&job, order);
        assert_eq!(Arc::strong_count(&job), 1, "nobody else holds the job");
        outcome
    }

    fn counters(n: usize) -> Vec<AtomicUsize> {
        (0..n).map(|_| AtomicUsize::new(0)).collect()
    }

    /// Each phase sees everything of the phases before it and nothing of those behind, also where members are
    /// late.
    fn check_phases(threads: usize, rounds: usize, late: bool) {
        let team = Team::new("test", threads).expect("threads");
        for _ in 0..rounds {
            let counts = counters(41);
            let finished = Arc::new(AtomicUsize::new(0));
            let ends = Arc::clone(&finished);
            let outcome = run(&team, move |member| {
                for phase in 0..60 {
                    let tasks = phase % 42;
                    let task = |task: usize, _: &mut Scratch| {
                        if late && (task + phase).is_multiple_of(13) {
                            thread::sleep(Duration::from_micros(300));
                        }
                        let before = (0..phase).filter(|earlier| task < earlier % 42).count();
                        assert_eq!(counts[task].fetch_add(1, Ordering::Relaxed), before, "phase {phase}");
                    };
                    let finish = || {
                        for (task, count) in counts.iter().enumerate() {
                            let want = (0..=phase).filter(|earlier| task < earlier % 42).count();
                            assert_eq!(count.load(Ordering::Relaxed), want, "end of phase {phase}");
                        }
                        ends.fetch_add(1, Ordering::Relaxed);
                    };
                    member.phase(tasks, task, finish)?;
                }
                Ok(())
            });
            outcome.expect("every count as expected");
            assert_eq!(finished.load(Ordering::Relaxed), 60 - 2, "two phases have no tasks");
        }
    }

    #[test]
    fn phases_run_every_task_once_and_in_order() {
        for threads in [1, 2, 3, 8] {
            check_phases(threads, 100, false);
            check_phases(threads, 3, true);
        }
    }

    #[test]
    fn who_is_late_is_not_waited_for() {
        let team = Team::new("test", 2).expect("threads");
        let entered = AtomicUsize::new(0);
        let outcome = run(&team, move |member| {
            // One of the two, if it comes at all, stays outside until the other has done everything alone.
            let alone = entered.fetch_add(1, Ordering::Relaxed) == 0;
            while !alone && entered.load(Ordering::Acquire) < 1000 {
                thread::yield_now();
            }
            for _ in 0..100 {
                member.phase(3, |_, _| (), || ())?;
            }
            if alone {
                entered.store(1000, Ordering::Release);
            }
            Ok(())
        });
        outcome.expect("no panic");
    }

    #[test]
    fn a_panic_of_one_member_ends_the_job_and_the_team_goes_on() {
        for threads in [1, 2, 3] {
            let team = Team::new("test", threads).expect("threads");
            for slow in [false, true] {
                let outcome = run(&team, move |member| {
                    let task = |task, _: &mut Scratch| {
                        if task == 5 {
                            // The others sleep by then.
                            thread::sleep(Duration::from_millis(if slow { 20 } else { 0 }));
                            panic!("task {task} is broken");
                        }
                    };
                    member.phase(8, task, || ())?;
                    member.phase(1, |_, _| panic!("it goes on"), || ())
                });
                assert_eq!(outcome.expect_err("a panic"), "task 5 is broken");
                check_sum(&team);
            }
        }
    }

    #[test]
    fn after_a_panic_nobody_is_at_work_any_more() {
        let team = Team::new("test", 3).expect("threads");
        for _ in 0..20 {
            let at_work = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&at_work);
            let outcome = run(&team, move |member| {
                let task = |task, _: &mut Scratch| {
                    count.fetch_add(1, Ordering::SeqCst);
                    if task == 1 {
                        count.fetch_sub(1, Ordering::SeqCst);
                        panic!("broken");
                    }
                    thread::sleep(Duration::from_millis(2));
                    count.fetch_sub(1, Ordering::SeqCst);
                };
                member.phase(6, task, || ())
            });
            assert!(outcome.is_err());
            assert_eq!(at_work.load(Ordering::SeqCst), 0);
        }
    }

    fn check_sum(team: &Team) {
        let sum = Arc::new(AtomicUsize::new(0));
        let total = Arc::clone(&sum);
        let body = move |member: &mut Member<'_>| {
            let task = |task, _: &mut Scratch| {
                total.fetch_add(task, Ordering::Relaxed);
            };
            member.phase(100, task, || ())
        };
        run(team, body).expect("no panic");
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }

    #[test]
    fn sleepers_wake() {
        let team = Team::new("test", 3).expect("threads");
        for _ in 0..3 {
            let outcome = run(&team, |member| {
                for _ in 0..5 {
                    member.phase(1, |_, _| thread::sleep(Duration::from_millis(5)), || ())?;
                }
                Ok(())
            });
            outcome.expect("no panic");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn programs_from_several_threads_take_turns() {
        let team = Team::new("test", 2).expect("threads");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| check_sum(&team)));
            }
        });
    }
}
