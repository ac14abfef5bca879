//! What can happen next, one small step at a time, each as the code of the mount, of kmsd and of the kernel takes it.

use super::world::{
    Ask, Job, Key, MOUNTS, Page, Pc, Process, Revoke, SLOTS, Side, Slot, Stage, State, World,
};
use crate::engine::clearing::{Cache, Cleared, Clearing, Seen, Step, takes_over};

/// A bug that is put in, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plant {
    Nothing,
    /// The mount acknowledges after its first purge.
    AcknowledgesEarly,
    /// The mount remembers what it acknowledged, and not to which session.
    AcknowledgesOnce,
    /// No read lock is held from where the key's state is seen until its holder is registered.
    IssuesUnlocked,
    /// A DEK leaves before its row is stored.
    IssuesUnregistered,
    /// The next kmsd does not load the rows of holders.
    RestartForgets,
    /// Adoption deletes the old row before the new one is stored.
    AdoptsTooEarly,
    /// A killed process is taken to have ended.
    KillsWithoutWaiting,
    /// What a dead mount leaves is invalidated once.
    InvalidatesOnce,
    /// A dead mount's connection is not ended.
    DoesNotAbort,
    /// kmsd believes a mount that closes its session.
    BelievesClose,
    /// A session may end while descriptors are taken in for it.
    EndsWhileAttaching,
    /// An acknowledgement counts for every epoch.
    AnyAcknowledgement,
    /// What was taken over by another is taken to be cleared: the holders are listed once.
    ListsOnce,
}

/// By mount or slot, where there are several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    // The administrator.
    Disable,
    DisableUnstored,
    Schedule,
    Destroy,
    Enable,
    // kmsd.
    Crash,
    CrashWithoutDescriptors,
    Restart,
    List,
    Start(usize),
    Watch(usize),
    Decide(usize),
    Act(usize),
    TimePasses(usize),
    SideStep,
    Register(usize),
    AnswerLeaves(usize),
    ReadState(usize),
    // A mount.
    Birth,
    Renew(usize),
    TakeAnswer(usize),
    Purge(usize),
    Wipe(usize),
    PurgeAgain(usize),
    Acknowledge(usize),
    OpenSession(usize),
    Attach(usize),
    AskForKeys(usize),
    TakeKeys(usize),
    Mount(usize),
    CallFails(usize),
    LeaseEnds(usize),
    Ends(usize),
    Close(usize),
    Stop(usize),
    Continue(usize),
    Kill(usize),
    Exit(usize),
    Cut(usize),
    Heal(usize),
    // The kernel and programs.
    Read(usize),
    Write(usize),
    CloseFile(usize),
    Unmount(usize),
    Abort(usize),
}

/// Every action.
pub(super) fn actions() -> Vec<Action> {
    use Action::*;
    let mut all = vec![
        Restart,
        List,
        SideStep,
        Birth,
        Disable,
        Schedule,
        Destroy,
        Enable,
        DisableUnstored,
        Crash,
        CrashWithoutDescriptors,
    ];
    for slot in 0..SLOTS {
        all.extend([
            Start(slot),
            Watch(slot),
            Decide(slot),
            Act(slot),
            TimePasses(slot),
        ]);
    }
    for m in 0..MOUNTS {
        all.extend([
            Register(m),
            AnswerLeaves(m),
            ReadState(m),
            Renew(m),
            TakeAnswer(m),
            Purge(m),
            Wipe(m),
            PurgeAgain(m),
            Acknowledge(m),
            OpenSession(m),
            Attach(m),
            AskForKeys(m),
            TakeKeys(m),
            Mount(m),
            CallFails(m),
            LeaseEnds(m),
            Ends(m),
            Close(m),
            Stop(m),
            Continue(m),
            Kill(m),
            Exit(m),
            Cut(m),
            Heal(m),
            Read(m),
            Write(m),
            CloseFile(m),
            Unmount(m),
            Abort(m),
        ]);
    }
    all
}

fn spend(budget: &mut u8) -> Option<()> {
    *budget = budget.checked_sub(1)?;
    Some(())
}

fn when(is_so: bool) -> Option<()> {
    is_so.then_some(())
}

impl World {
    /// The state after `action`, if that can happen.
    pub(super) fn after(&self, action: Action, plant: Plant) -> Option<Self> {
        let mut next = self.clone();
        next.take(action, plant)?;
        next.settle();
        Some(next)
    }

    fn take(&mut self, action: Action, plant: Plant) -> Option<()> {
        match action {
            Action::Disable => self.revoke(Key::Disabled, plant),
            Action::Schedule => self.revoke(Key::PendingDeletion, plant),
            Action::DisableUnstored => {
                when(self.is_up && self.key.0 == Key::Enabled && self.may_write(plant))?;
                spend(&mut self.budget.unstored)?;
                self.key = (Key::Disabled, self.key.1 + 1);
                Some(())
            }
            Action::Destroy => {
                when(self.is_up && self.revoke.is_none() && self.key.0 == Key::PendingDeletion)?;
                self.revoke = Some(Revoke {
                    epoch: self.key.1,
                    destroys: true,
                    waits: 0,
                    stuck: 0,
                });
                Some(())
            }
            Action::Enable => {
                when(self.is_up && self.revoke.is_none() && self.may_write(plant))?;
                when(matches!(self.key.0, Key::Disabled | Key::PendingDeletion))?;
                spend(&mut self.budget.enables)?;
                self.key.0 = Key::Enabled;
                self.stored = self.key;
                self.is_promised = false;
                Some(())
            }
            Action::Crash => self.crash(true),
            Action::CrashWithoutDescriptors => self.crash(false),
            Action::Restart => self.restart(plant),
            Action::List => self.list(plant),
            Action::Start(slot) => self.start(slot),
            Action::Watch(slot) => self.watch(slot),
            Action::Decide(slot) => self.decide(slot, plant),
            Action::Act(slot) => self.act(slot, plant),
            Action::TimePasses(slot) => {
                let job = self.slots[slot].job.as_mut()?;
                when(!job.is_overdue && job.decided.is_none())?;
                job.is_overdue = true;
                Some(())
            }
            Action::SideStep => self.side_step(plant),
            Action::Birth => {
                let first = self.mounts[0];
                when(self.mounts[1].process == Process::Unborn && !(self.reuses_minor && first.is_there()))?;
                spend(&mut self.budget.births)?;
                self.mounts[1].process = Process::Running;
                Some(())
            }
            Action::Register(m) | Action::AnswerLeaves(m) | Action::ReadState(m) => {
                self.serve(action, m, plant)
            }
            Action::Stop(m) => {
                when(self.mounts[m].runs())?;
                spend(&mut self.budget.stops)?;
                self.mounts[m].process = Process::Stopped;
                Some(())
            }
            Action::Continue(m) => {
                when(self.mounts[m].process == Process::Stopped)?;
                self.mounts[m].process = Process::Running;
                Some(())
            }
            Action::Kill(m) => {
                let mount = &mut self.mounts[m];
                when(matches!(mount.process, Process::Running | Process::Stopped) && !mount.is_killed)?;
                spend(&mut self.budget.kills)?;
                mount.is_killed = true;
                Some(())
            }
            Action::Exit(m) => {
                when(self.mounts[m].is_killed)?;
                self.mounts[m].process = Process::Dead;
                Some(())
            }
            Action::Cut(m) => {
                when(self.mounts[m].process != Process::Dead && !self.mounts[m].is_cut)?;
                spend(&mut self.budget.cuts)?;
                self.mounts[m].is_cut = true;
                Some(())
            }
            Action::Heal(m) => {
                when(self.mounts[m].is_cut)?;
                self.mounts[m].is_cut = false;
                Some(())
            }
            Action::Read(m)
            | Action::Write(m)
            | Action::CloseFile(m)
            | Action::Unmount(m)
            | Action::Abort(m) => self.use_files(action, m),
            Action::Renew(m)
            | Action::TakeAnswer(m)
            | Action::Purge(m)
            | Action::Wipe(m)
            | Action::PurgeAgain(m)
            | Action::Acknowledge(m)
            | Action::OpenSession(m)
            | Action::Attach(m)
            | Action::AskForKeys(m)
            | Action::TakeKeys(m)
            | Action::Mount(m)
            | Action::CallFails(m)
            | Action::LeaseEnds(m)
            | Action::Ends(m)
            | Action::Close(m) => {
                when(self.mounts[m].runs())?;
                self.run_mount(action, m, plant)
            }
        }
    }

    /// The key's write lock can be had.
    fn may_write(&self, plant: Plant) -> bool {
        let locks = |ask| match ask {
            Ask::Permitted => plant != Plant::IssuesUnlocked,
            Ask::Registered => true,
            Ask::Answered => false,
        };
        !self.mounts.iter().any(|mount| mount.ask.is_some_and(locks))
    }

    fn revoke(&mut self, to: Key, plant: Plant) -> Option<()> {
        when(self.is_up && self.revoke.is_none() && self.may_write(plant))?;
        let is_change = match (self.key.0, to) {
            (Key::Enabled, _) | (Key::Disabled, Key::PendingDeletion) => true,
            (Key::Disabled, Key::Disabled) => false,
            _ => return None,
        };
        if is_change {
            spend(&mut self.budget.revocations)?;
            self.key = (to, self.key.1 + 1);
        }
        self.stored = self.key;
        self.revoke = Some(Revoke {
            epoch: self.key.1,
            destroys: false,
            waits: 0,
            stuck: 0,
        });
        Some(())
    }

    fn crash(&mut self, keeps: bool) -> Option<()> {
        when(self.is_up)?;
        spend(&mut self.budget.crashes)?;
        self.is_up = false;
        self.key = self.stored;
        (self.revoke, self.side) = (None, None);
        for slot in &mut self.slots {
            slot.is_kept &= keeps;
            slot.forget();
        }
        for mount in &mut self.mounts {
            // An answer that has left arrives.
            if matches!(mount.ask, Some(Ask::Permitted | Ask::Registered)) {
                (mount.ask, mount.is_asking) = (None, false);
                if mount.pc == Pc::Relighting {
                    mount.pc = Pc::Idle;
                }
            }
            if let Pc::Renewing(_) = mount.pc {
                mount.pc = Pc::Idle;
            }
            if let Pc::Waiting(then) = mount.pc {
                mount.fails(then);
            }
        }
        Some(())
    }

    fn restart(&mut self, plant: Plant) -> Option<()> {
        when(!self.is_up)?;
        self.is_up = true;
        for slot in &mut self.slots {
            let Some((uses_key, minor)) = slot.row else {
                slot.is_kept = false;
                *slot = Slot::free();
                continue;
            };
            if plant == Plant::RestartForgets {
                continue;
            }
            (slot.is_known, slot.is_left) = (true, true);
            (slot.uses_key, slot.minor, slot.has_reach) = (uses_key, minor, slot.is_kept);
        }
        Some(())
    }

    fn list(&mut self, plant: Plant) -> Option<()> {
        let revoke = self.revoke?;
        when(revoke.waits == 0)?;
        let is_second = plant == Plant::ListsOnce && revoke.stuck & 0x80 != 0;
        let waits = (0..SLOTS).filter(|&s| {
            let slot = &self.slots[s];
            slot.is_known && slot.uses_key && slot.cleared < revoke.epoch && revoke.stuck & (1 << s) == 0
        });
        let waits = waits.fold(0, |bits, s| bits | (1 << s));
        if waits != 0 && !is_second {
            let mark = if plant == Plant::ListsOnce { 0x80 } else { 0 };
            self.revoke = Some(Revoke {
                waits,
                stuck: revoke.stuck | mark,
                ..revoke
            });
            return Some(());
        }
        self.revoke = None;
        if revoke.stuck & 0x7f == 0 {
            self.is_promised = true;
            if revoke.destroys {
                self.key = (Key::Destroyed, self.key.1 + 1);
                self.stored = self.key;
            }
        }
        Some(())
    }

    fn start(&mut self, s: usize) -> Option<()> {
        let revoke = self.revoke?;
        when(revoke.waits & (1 << s) != 0 && self.slots[s].job.is_none())?;
        self.slots[s].job = Some(Job {
            clearing: Clearing::of(revoke.epoch.into()),
            is_watcher: false,
            decided: None,
            is_overdue: false,
        });
        Some(())
    }

    fn watch(&mut self, s: usize) -> Option<()> {
        let slot = &self.slots[s];
        when(self.is_up && slot.is_known && !slot.was_watched && slot.job.is_none())?;
        when(self.mounts[usize::from(slot.mount)].process == Process::Dead)?;
        self.slots[s].was_watched = true;
        self.slots[s].job = Some(Job {
            clearing: Clearing::of(u64::MAX),
            is_watcher: true,
            decided: None,
            is_overdue: true,
        });
        Some(())
    }

    fn see(&self, s: usize, is_overdue: bool, plant: Plant) -> Seen {
        let slot = &self.slots[s];
        let mount = &self.mounts[usize::from(slot.mount)];
        let acknowledged = match plant {
            Plant::AnyAcknowledgement if slot.acknowledged > 0 => u64::MAX - 1,
            _ => slot.acknowledged.into(),
        };
        Seen {
            acknowledged,
            has_exited: mount.process == Process::Dead
                || (plant == Plant::KillsWithoutWaiting && mount.is_killed),
            cache: Cache::of(slot.has_reach.then(|| !mount.is_there()), slot.minor, |minor| {
                self.may_be_mounted(minor)
            }),
            is_overdue,
        }
    }

    fn decide(&mut self, s: usize, plant: Plant) -> Option<()> {
        let job = self.slots[s].job.clone()?;
        when(job.decided.is_none())?;
        if !self.slots[s].is_known {
            self.finish(s, false);
            return Some(());
        }
        let step = job.clearing.next(&self.see(s, job.is_overdue, plant));
        when(step != Step::Wait)?;
        self.slots[s].job = Some(Job {
            decided: Some(step),
            ..job
        });
        Some(())
    }

    /// The thread that clears a slot ends.
    fn finish(&mut self, s: usize, is_stuck: bool) {
        let Some(job) = self.slots[s].job.take() else {
            return;
        };
        if let Some(revoke) = self.revoke.as_mut().filter(|_| !job.is_watcher) {
            revoke.waits &= !(1 << s);
            revoke.stuck |= u8::from(is_stuck) << s;
        }
        let is_in_use = self.side.is_some_and(|side| usize::from(side.slot) == s);
        if !self.slots[s].is_known && !is_in_use {
            self.slots[s] = Slot::free();
        }
    }

    fn end_session(&mut self, s: usize) {
        let is_in_use = self.side.is_some_and(|side| usize::from(side.slot) == s);
        let slot = &mut self.slots[s];
        (slot.is_known, slot.row, slot.is_kept, slot.has_reach) = (false, None, false, false);
        if slot.job.is_none() && !is_in_use {
            *slot = Slot::free();
        }
    }

    /// Its row is being written.
    fn is_row_held(&self, s: usize) -> bool {
        self.side.is_some_and(|side| {
            usize::from(side.slot) == s && !matches!(side.stage, Stage::Keep | Stage::Attach)
        })
    }

    fn act(&mut self, s: usize, plant: Plant) -> Option<()> {
        let step = self.slots[s].job.as_ref()?.decided?;
        let m = usize::from(self.slots[s].mount);
        let has_reach = self.slots[s].has_reach;
        let mount = &mut self.mounts[m];
        // A dirty page's write-back waits for a server, and a program's call for its answer.
        let blocks = |mount: &super::world::Mount| {
            mount.page == Page::Dirty && !mount.is_aborted && mount.process != Process::Running
        };
        let went_well = match step {
            Step::Wait => return None,
            Step::Done(cleared) => {
                if cleared != Cleared::Acknowledged && plant != Plant::EndsWhileAttaching {
                    when(!self.is_row_held(s))?;
                    // Looked at again: a mount may have been attached since.
                    let job = self.slots[s].job.clone()?;
                    if job.clearing.next(&self.see(s, job.is_overdue, plant)) != step {
                        self.slots[s].job = Some(Job { decided: None, ..job });
                        return Some(());
                    }
                }
                let epoch = self.revoke.map_or(0, |revoke| revoke.epoch);
                if cleared == Cleared::Acknowledged {
                    self.slots[s].cleared = self.slots[s].cleared.max(epoch);
                } else {
                    self.end_session(s);
                }
                self.finish(s, false);
                return Some(());
            }
            Step::Stuck(_) => {
                self.finish(s, true);
                return Some(());
            }
            Step::Invalidate => {
                mount.has_attributes &= !has_reach;
                let is_done = has_reach && !blocks(mount);
                if is_done {
                    mount.drop_pages();
                }
                is_done
            }
            Step::Kill => {
                mount.is_killed |= matches!(mount.process, Process::Running | Process::Stopped);
                true
            }
            Step::Bury => {
                if has_reach {
                    mount.is_aborted |= plant != Plant::DoesNotAbort;
                    mount.has_attributes = false;
                }
                let is_done = has_reach && !blocks(mount);
                if is_done {
                    mount.drop_pages();
                    if plant != Plant::InvalidatesOnce {
                        mount.drop_pages();
                    }
                }
                is_done
            }
        };
        let job = self.slots[s].job.as_mut()?;
        job.clearing.did(step, went_well);
        job.decided = None;
        job.is_overdue &= step != Step::Kill;
        Some(())
    }

    fn side_step(&mut self, plant: Plant) -> Option<()> {
        let side = self.side?;
        let s = usize::from(side.slot);
        let m = usize::from(self.slots[s].mount);
        if !self.slots[s].is_known && plant != Plant::EndsWhileAttaching {
            self.side = None;
            self.slots[s] = Slot::free();
            if let Pc::Waiting(then) = self.mounts[m].pc {
                self.mounts[m].fails(then);
            }
            return Some(());
        }
        let left: Vec<usize> = (0..SLOTS)
            .filter(|&old| {
                let old = &self.slots[old];
                old.is_known
                    && old.is_left
                    && usize::from(old.mount) == m
                    && takes_over(side.minor, old.minor)
            })
            .collect();
        let stage = match side.stage {
            Stage::Keep => {
                self.slots[s].is_kept = true;
                Stage::Attach
            }
            Stage::Attach => {
                self.slots[s].has_reach = true;
                self.slots[s].minor = side.minor;
                self.slots[s].row = Some((self.slots[s].uses_key, side.minor));
                Stage::Store
            }
            Stage::Store => {
                let uses_key = left.iter().any(|&old| self.slots[old].uses_key);
                for &old in &left {
                    self.slots[old].row = None;
                }
                if plant == Plant::AdoptsTooEarly && uses_key {
                    Stage::StoreLate
                } else {
                    self.adopt(s, uses_key);
                    Stage::Remove
                }
            }
            Stage::StoreLate => {
                self.adopt(s, true);
                Stage::Remove
            }
            Stage::Remove => {
                for old in left {
                    self.end_session(old);
                }
                self.side = None;
                if !self.slots[s].is_known {
                    self.slots[s].forget();
                }
                let mount = &mut self.mounts[m];
                let Pc::Waiting(then) = mount.pc else {
                    return Some(());
                };
                mount.pc = match side.minor {
                    None if mount.is_mounted || mount.is_open => Pc::Opened(side.slot, then),
                    _ => {
                        mount.session = Some(side.slot);
                        if plant != Plant::AcknowledgesOnce {
                            mount.acknowledged = 0;
                        }
                        mount.serves |= side.minor.is_some();
                        then.map_or(Pc::Idle, Pc::Acknowledging)
                    }
                };
                return Some(());
            }
        };
        self.side = Some(Side { stage, ..side });
        Some(())
    }

    fn adopt(&mut self, s: usize, uses_key: bool) {
        let slot = &mut self.slots[s];
        if uses_key && !slot.uses_key {
            slot.uses_key = true;
            slot.row = Some((true, slot.minor));
        }
    }

    /// kmsd's part of a mount's calls.
    fn serve(&mut self, action: Action, m: usize, plant: Plant) -> Option<()> {
        when(self.is_up)?;
        let key = self.key.0;
        let mount = &mut self.mounts[m];
        match (action, mount.ask) {
            (Action::ReadState(_), _) => {
                let Pc::Renewing(epoch) = mount.pc else {
                    return None;
                };
                mount.pc = Pc::Answered(epoch, key == Key::Enabled);
            }
            (Action::Register(_), Some(Ask::Permitted)) => {
                mount.ask = Some(Ask::Registered);
                let session = mount.session.filter(|&s| self.slots[usize::from(s)].is_known);
                let slot = session.map(|s| &mut self.slots[usize::from(s)]);
                match slot.filter(|slot| usize::from(slot.mount) == m) {
                    Some(slot) if plant != Plant::IssuesUnregistered => {
                        slot.uses_key = true;
                        slot.row = Some((true, slot.minor));
                    }
                    Some(_) => {}
                    None => {
                        mount.ask = None;
                        mount.is_asking = false;
                        if mount.pc == Pc::Relighting {
                            mount.pc = Pc::Idle;
                        }
                    }
                }
            }
            (Action::AnswerLeaves(_), Some(Ask::Registered)) => {
                mount.ask = mount.is_asking.then_some(Ask::Answered);
            }
            _ => return None,
        }
        Some(())
    }

    /// The slot of a session that kmsd knows of this mount.
    fn known(&self, session: Option<u8>) -> Option<usize> {
        let s = usize::from(session?);
        let slot = &self.slots[s];
        (slot.is_known && !slot.is_left).then_some(s)
    }

    #[allow(clippy::too_many_lines)]
    fn run_mount(&mut self, action: Action, m: usize, plant: Plant) -> Option<()> {
        let mut mount = self.mounts[m];
        let reaches = self.is_up && !mount.is_cut;
        let known = self
            .known(mount.session)
            .filter(|&s| usize::from(self.slots[s].mount) == m);
        let is_over = mount.serves && (mount.is_aborted || !mount.is_there());
        match (action, mount.pc) {
            (Action::Renew(_), Pc::Idle) if reaches && mount.serves => {
                mount.pc = match known {
                    Some(_) => Pc::Renewing(self.key.1),
                    None => Pc::Opening(None),
                };
            }
            (Action::TakeAnswer(_), Pc::Answered(epoch, is_enabled)) => {
                mount.pc = match (is_enabled, mount.state) {
                    (true, State::Live) => Pc::Idle,
                    (true, _) => Pc::Relighting,
                    (false, State::Live) => mount.begin_draining(Some(epoch)),
                    (false, _) => Pc::Acknowledging(epoch),
                };
            }
            (Action::LeaseEnds(_), Pc::Idle) if !reaches && mount.state == State::Live && mount.serves => {
                mount.pc = mount.begin_draining(None);
            }
            (Action::Purge(_), Pc::Draining(epoch)) => {
                mount.drop_pages();
                if let (Plant::AcknowledgesEarly, Some(epoch), Some(s)) =
                    (plant, epoch, known.filter(|_| reaches))
                {
                    self.slots[s].acknowledged = self.slots[s].acknowledged.max(epoch);
                }
                mount.pc = Pc::Purged(epoch);
            }
            (Action::Wipe(_), Pc::Purged(epoch)) => {
                (mount.has_keys, mount.state) = (false, State::Dark);
                mount.pc = Pc::Wiped(epoch);
            }
            (Action::PurgeAgain(_), Pc::Wiped(epoch)) => {
                mount.drop_pages();
                mount.pc = epoch.map_or(Pc::Idle, Pc::Acknowledging);
            }
            (Action::Acknowledge(_), Pc::Acknowledging(epoch)) => {
                if mount.acknowledged >= epoch {
                    mount.pc = Pc::Idle;
                } else {
                    when(reaches)?;
                    match known {
                        None => mount.pc = Pc::Opening(Some(epoch)),
                        // One that has not come yet is refused.
                        Some(_) if epoch > self.key.1 => mount.pc = Pc::Idle,
                        Some(s) => {
                            self.slots[s].acknowledged = self.slots[s].acknowledged.max(epoch);
                            mount.acknowledged = epoch;
                            mount.pc = Pc::Idle;
                        }
                    }
                }
            }
            (Action::OpenSession(_), Pc::Opening(then)) if reaches && self.side.is_none() => {
                let free = (0..SLOTS).find(|&s| self.is_free(s))?;
                self.slots[free] = Slot {
                    mount: m as u8,
                    is_known: true,
                    ..Slot::free()
                };
                self.side = Some(Side {
                    slot: free as u8,
                    stage: Stage::Store,
                    minor: None,
                });
                mount.pc = Pc::Waiting(then);
            }
            (Action::Attach(_), Pc::Opened(slot, then)) if reaches && self.side.is_none() => {
                match self
                    .known(Some(slot))
                    .filter(|&s| usize::from(self.slots[s].mount) == m)
                {
                    None => mount.fails(then),
                    Some(_) => {
                        let minor = Some(self.minor_of(m));
                        self.side = Some(Side {
                            slot,
                            stage: Stage::Keep,
                            minor,
                        });
                        mount.pc = Pc::Waiting(then);
                    }
                }
            }
            (Action::AskForKeys(_), pc) if reaches && mount.ask.is_none() => {
                let is_first = pc == Pc::Idle && !mount.serves && !mount.has_keys;
                let is_wanted =
                    pc == Pc::Relighting || is_first || mount.state == State::Live && mount.serves;
                when(is_wanted)?;
                // Of all asks of a live mount, those matter that are under way when something else happens.
                when(pc == Pc::Relighting || is_first || !matches!(pc, Pc::Draining(_)))?;
                match known {
                    None if pc == Pc::Relighting => mount.pc = Pc::Opening(None),
                    None => return None,
                    Some(_) if self.key.0 != Key::Enabled => {
                        when(pc == Pc::Relighting)?;
                        mount.pc = Pc::Idle;
                    }
                    Some(_) => {
                        if is_first {
                            mount.pc = Pc::Relighting;
                        }
                        (mount.ask, mount.is_asking) = (Some(Ask::Permitted), true);
                    }
                }
            }
            (Action::TakeKeys(_), pc) if mount.ask == Some(Ask::Answered) => {
                mount.ask = None;
                if mount.is_asking {
                    mount.is_asking = false;
                    mount.has_keys = true;
                    if pc == Pc::Relighting {
                        mount.state = State::Live;
                        mount.pc = if mount.serves { Pc::Idle } else { Pc::Mounting };
                    }
                }
            }
            (Action::Mount(_), Pc::Mounting) => {
                when(!self.may_be_mounted(self.minor_of(m)))?;
                mount.is_mounted = true;
                mount.pc = Pc::Opened(mount.session?, None);
            }
            (Action::CallFails(_), pc) if !reaches => match pc {
                Pc::Renewing(_) | Pc::Answered(..) | Pc::Acknowledging(_) => mount.pc = Pc::Idle,
                Pc::Opening(then) | Pc::Waiting(then) | Pc::Opened(_, then)
                    if mount.serves || mount.is_mounted =>
                {
                    mount.fails(then);
                }
                Pc::Relighting if mount.ask.is_none_or(|ask| ask == Ask::Answered) => {
                    (mount.ask, mount.is_asking) = (None, false);
                    mount.pc = Pc::Idle;
                }
                _ => return None,
            },
            (Action::Ends(_), Pc::Idle) if is_over => {
                (mount.has_keys, mount.state, mount.is_asking) = (false, State::Dark, false);
                mount.pc = Pc::Closing;
            }
            (Action::Close(_), Pc::Closing) => {
                if let Some(s) = known.filter(|_| reaches)
                    && (plant == Plant::BelievesClose || !mount.is_there())
                {
                    self.end_session(s);
                }
                mount.process = Process::Dead;
            }
            _ => return None,
        }
        self.mounts[m] = mount;
        Some(())
    }

    fn is_free(&self, s: usize) -> bool {
        let is_used = self.mounts.iter().any(|mount| {
            mount.session == Some(s as u8)
                || matches!(mount.pc, Pc::Opened(slot, _) if usize::from(slot) == s)
        });
        self.slots[s] == Slot::free() && !is_used
    }

    fn use_files(&mut self, action: Action, m: usize) -> Option<()> {
        let mount = &mut self.mounts[m];
        match action {
            Action::Read(_) => {
                let is_served = mount.serves && mount.runs() && mount.state == State::Live;
                when(is_served && mount.is_there() && !mount.is_aborted && mount.page == Page::None)?;
                (mount.is_open, mount.has_attributes, mount.page) = (true, true, Page::Clean);
            }
            Action::Write(_) => {
                when(mount.is_open && mount.has_attributes && mount.page == Page::Clean)?;
                mount.page = Page::Dirty;
            }
            // close(2) waits for an answer.
            Action::CloseFile(_) => {
                when(mount.is_open && (mount.is_aborted || mount.runs()))?;
                mount.is_open = false;
            }
            Action::Unmount(_) => {
                when(mount.is_mounted && (mount.serves || mount.process == Process::Dead))?;
                spend(&mut self.budget.unmounts)?;
                mount.is_mounted = false;
            }
            Action::Abort(_) => {
                when(mount.serves && !mount.is_aborted)?;
                spend(&mut self.budget.aborts)?;
                mount.is_aborted = true;
            }
            _ => return None,
        }
        Some(())
    }
}

impl super::world::Mount {
    fn begin_draining(&mut self, epoch: Option<u8>) -> Pc {
        self.state = State::Draining;
        // Who waits for kmsd is told to give up, and lets go of the gate.
        self.is_asking = false;
        if self.ask == Some(Ask::Answered) {
            self.ask = None;
        }
        Pc::Draining(epoch)
    }

    /// A session could not be opened, or nothing handed over.
    fn fails(&mut self, then: Option<u8>) {
        if self.serves {
            self.pc = Pc::Idle;
        } else if self.is_mounted {
            // It undoes the mount, and ends.
            (self.is_mounted, self.is_aborted, self.process) = (false, true, Process::Dead);
        } else {
            self.pc = Pc::Opening(then);
        }
    }
}
