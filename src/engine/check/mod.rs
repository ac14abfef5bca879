//! Checking a volume that is not mounted: every record, every name, every count, every slot; with scrubbing, every block.
//! And repairing what can be repaired without a guess. docs/fsck.md says what is looked for.
//!
//! Records are read in the order of their keys, so that memory is needed for the inodes alone, some 150 bytes for each.

mod content;
mod links;
mod names;
mod records;
mod repair;
mod report;
mod roots;
mod scrub;
mod slotfiles;

pub use report::{CheckedDomain, Counts, Event, Fault, Problem, Report};

use super::clock::Clock;
use super::core::{Access, Core};
use super::error::Result;
use super::keyservice::KeyService;
use super::open::{OpenError, Writing, open_core};
use super::types::{FileKind, Ino};
use super::upkeep::{self, Threads};
use super::verification::Verify;
use super::volume::{Options, Volume};
use repair::Fix;
use scrub::BadBlocks;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

/// How a volume is checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckOptions {
    /// Read every block and open it, which needs every file's key.
    pub scrub: bool,
    /// Repair what can be repaired. Without it nothing on storage changes.
    pub repair: bool,
    /// With `repair`: take the records that are there for those that were last written, whatever was put back, removed or
    /// added, and have the roots say so.
    pub accept_records: bool,
}

impl Volume {
    /// Checks the volume in `dir`, which nobody has mounted, and tells `watch` of its progress and of each problem as it is
    /// found.
    ///
    /// # Errors
    /// Why it cannot be opened, or why the check broke off: what was found before has been told.
    pub fn check(
        dir: &Path,
        options: CheckOptions,
        keys: Arc<dyn KeyService>,
        clock: Arc<dyn Clock>,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> std::result::Result<Report, OpenError> {
        let engine = Options {
            read_only: !options.repair,
            // It does that itself.
            verify: Verify::Off,
            // An older volume is to be checked, too, and a repair is told of by the next mount.
            anchor: false,
            ..Options::default()
        };
        let writing = match options.repair {
            true => Writing::Allowed,
            false => Writing::Nothing,
        };
        let opened = open_core(dir, engine, keys, clock, writing)?;
        let core = Arc::clone(&opened.core);
        // A check may outlast the lease by hours; and a key that is revoked meanwhile ends it.
        let background = upkeep::start(opened, Threads::KeysAlone)?;
        let volume = Self::with_background(Arc::clone(&core), background);
        let outcome = run(&core, options, watch);
        let closed = volume.close();
        let mut report = outcome?;
        if let Err(error) = closed {
            report.problems.push(Problem {
                fault: Fault::Record,
                ino: None,
                path: None,
                detail: format!("not all of it could be stored: {error}"),
                is_repaired: false,
            });
        }
        Ok(report)
    }
}

/// What is known of an inode.
#[derive(Debug, Default)]
struct Known {
    kind: Option<FileKind>,
    nlink: u32,
    children: u64,
    xattrs: u32,
    blocks: u64,
    runs: u64,
    /// The parent that a directory's record names.
    parent: Ino,
    /// What was counted.
    found: Found,
}

/// What other records say of an inode.
#[derive(Debug, Default)]
struct Found {
    names: u32,
    /// Where one of its names is: the directory and the place.
    name: Option<(Ino, u64)>,
    children: u64,
    subdirectories: u32,
    xattrs: u32,
    /// Whether one of them is damaged, so that their count means nothing.
    are_xattrs_damaged: bool,
    is_orphan: bool,
    has_chunks: bool,
    has_runs: bool,
    /// Whether a record of its content is damaged, so that its counts mean nothing.
    is_content_damaged: bool,
}

/// A check under way. It holds the volume's keys throughout: whatever takes long asks `go_on`, and breaks off when they are
/// to go.
struct Check<'c> {
    core: &'c Core,
    access: Access<'c>,
    watch: &'c mut dyn FnMut(Event<'_>),
    inodes: HashMap<Ino, Known>,
    /// Inodes whose record is damaged: what belongs to them is not left over.
    damaged: BTreeSet<Ino>,
    /// Inodes that are gone but for their slot files.
    unlinked: BTreeSet<Ino>,
    /// Whether an entry is damaged, so that no count of names means anything.
    is_name_damaged: bool,
    /// Whether rows could not be read at all, so that nothing is concluded from what was not found.
    is_incomplete: bool,
    counts: Counts,
    findings: Vec<Finding>,
    bad_blocks: Option<BadBlocks>,
    /// How many of them were told.
    told: usize,
}

/// A problem, and what would repair it.
struct Finding {
    problem: Problem,
    fix: Option<Fix>,
}

fn run(core: &Core, options: CheckOptions, watch: &mut dyn FnMut(Event<'_>)) -> Result<Report> {
    for domain in core.domains.all() {
        // What comes to light while this goes on was not looked at, and is not to be reclaimed.
        domain.begin_orphans();
    }
    let mut check = Check {
        core,
        access: core.serve_all()?,
        watch,
        inodes: HashMap::new(),
        damaged: BTreeSet::new(),
        unlinked: BTreeSet::new(),
        is_name_damaged: false,
        is_incomplete: false,
        counts: Counts::default(),
        findings: Vec::new(),
        bad_blocks: None,
        told: 0,
    };
    // Until it is known which of them nothing speaks for, whatever ends the check.
    let orphans = core.withhold_orphans();
    check.find(options)?;
    check.tell();
    let domains = check.domains();
    // What a check did not see whole is not repaired: it would be taken for what is not there.
    let repairs = options.repair && !check.is_incomplete;
    let sure = check.sure_orphans(repairs);
    let Check {
        access,
        watch,
        mut findings,
        mut counts,
        ..
    } = check;
    drop(access);
    core.release_orphans(orphans.into_iter().filter(|ino| sure.contains(ino)));
    if repairs {
        repair::repair(core, &mut findings, watch)?;
        counts.orphans = counts.orphans.saturating_sub(sure.len() as u64);
    }
    Ok(Report {
        counts,
        problems: findings.into_iter().map(|finding| finding.problem).collect(),
        domains,
    })
}

impl Check<'_> {
    fn find(&mut self, options: CheckOptions) -> Result<()> {
        // Names first come with the second: problems are told with them.
        self.check_inodes()?;
        self.check_names()?;
        self.tell();
        self.check_attributes()?;
        self.check_content()?;
        self.tell();
        if !self.is_incomplete {
            self.check_slot_files()?;
            self.check_links();
            self.check_counters();
            self.check_roots(options.accept_records)?;
            self.tell();
        }
        if options.scrub {
            self.scrub()?;
        }
        Ok(())
    }

    /// The key domains, and which of them were looked at.
    fn domains(&self) -> Vec<CheckedDomain> {
        let reached = self.access.reached();
        let statuses = self.core.domain_statuses(Some(&self.access));
        let checked = statuses.into_iter().map(|status| CheckedDomain {
            is_checked: reached.contains(&status.domain),
            status,
        });
        checked.collect()
    }

    /// Inodes without a name, and without a doubt about it, that may be reclaimed.
    fn sure_orphans(&self, repairs: bool) -> BTreeSet<Ino> {
        if !repairs || self.is_name_damaged {
            return BTreeSet::new();
        }
        let is_sure = |known: &Known| known.nlink == 0 && known.found.names == 0 && known.found.children == 0;
        let inodes = self.inodes.iter().filter(|(_, known)| is_sure(known));
        inodes
            .map(|(ino, _)| *ino)
            .chain(self.unlinked.iter().copied())
            .collect()
    }
}

impl Check<'_> {
    fn progress(&mut self, phase: &'static str, done: u64, total: Option<u64>) {
        (self.watch)(Event::Progress { phase, done, total });
    }

    fn found(&mut self, fault: Fault, ino: Option<Ino>, detail: String, fix: Option<Fix>) {
        let problem = Problem {
            fault,
            ino,
            path: None,
            detail,
            is_repaired: false,
        };
        self.findings.push(Finding { problem, fix });
    }

    /// Tells what was found since the last time, with paths.
    fn tell(&mut self) {
        for index in self.told..self.findings.len() {
            let ino = self.findings.get(index).and_then(|finding| finding.problem.ino);
            let path = ino.and_then(|ino| self.path_of(ino));
            if let Some(finding) = self.findings.get_mut(index) {
                finding.problem.path = path;
                (self.watch)(Event::Found(&finding.problem));
            }
        }
        self.told = self.findings.len();
    }

    /// Whether an inode is there, damaged or not.
    fn is_known(&self, ino: Ino) -> bool {
        self.inodes.contains_key(&ino) || self.damaged.contains(&ino)
    }
}
