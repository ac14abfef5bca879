//! When a domain's rows are verified, and what follows if they are not those that were last written.
//!
//! *Full*: before anything is served, and what cannot be verified then is not. *Lazy*: in the background, once its keys may be used; where something does not
//! match, the domain takes no more changes, so that what is there can be looked at, and the log says so.

use super::bell::{Bell, Wake};
use super::core::Core;
use super::domains::KeyDomain;
use super::error::{Error, Result};
use super::keys::DomainKeys;
use super::scan::{Mismatch, Scanned, scan};
use super::sync::{Mutex, rank};
use super::types::Domain;
use super::upkeep::log_failure;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The priority (nice(1)) of the thread that verifies.
const NICE: i32 = 19;
/// How long it waits, with something left to verify, if nothing rings.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// Mismatches that are logged of one domain.
const LOGGED_MAX: u64 = 20;

/// When what storage holds is compared with what was last written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// After the volume is opened, in the background.
    #[default]
    Lazy,
    /// Before anything is served.
    Full,
    /// Never.
    Off,
}

/// How far the verification of a key domain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// It is not wanted.
    Off,
    /// The volume is of a format without roots: there is nothing to compare with.
    Unsupported,
    /// It waits for the domain's keys, or for its turn.
    Waiting,
    /// It is under way.
    Running {
        /// Inodes that were looked at.
        inodes: u64,
    },
    /// What is there is what was last written, as of the end of the verification.
    Matches {
        /// Inodes that were looked at.
        inodes: u64,
        /// Records that were looked at.
        records: u64,
    },
    /// It is not. The domain takes no changes.
    Differs {
        /// Inodes whose records are not those that were last written, and other findings.
        findings: u64,
    },
}

/// What the thread that verifies waits for.
#[derive(Default)]
pub(crate) struct VerifierBell {
    bell: Bell,
    /// The same as in the bell, for a scan, which keeps the database open and takes no lock.
    is_stopped: AtomicBool,
}

impl VerifierBell {
    /// There may be something to verify.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Has the thread end.
    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
        self.bell.stop();
    }
}

/// What is known of a domain's rows.
pub(crate) struct Trust {
    state: Mutex<Verification, rank::Domains>,
    /// Inodes looked at by the scan under way.
    inodes: AtomicU64,
    is_lost: AtomicBool,
}

impl Trust {
    pub(crate) fn new(verify: Verify) -> Self {
        Self {
            state: Mutex::new(match verify {
                Verify::Off => Verification::Off,
                Verify::Lazy | Verify::Full => Verification::Waiting,
            }),
            inodes: AtomicU64::new(0),
            is_lost: AtomicBool::new(false),
        }
    }

    /// Of a domain that was made just now: everything in it was written since.
    pub(crate) fn of_new() -> Self {
        let trust = Self::new(Verify::Off);
        *trust.state.lock() = Verification::Matches {
            inodes: 1,
            records: 1,
        };
        trust
    }

    /// Whether the rows were found not to be those that were written.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }

    /// Notes that they are not; there is nothing more to verify.
    pub(crate) fn lose(&self) {
        self.is_lost.store(true, Ordering::Release);
        self.set(Verification::Differs { findings: 1 });
    }

    pub(crate) fn verification(&self) -> Verification {
        let state = *self.state.lock();
        match state {
            Verification::Running { .. } => Verification::Running {
                inodes: self.inodes.load(Ordering::Relaxed),
            },
            state => state,
        }
    }

    fn is_due(&self) -> bool {
        *self.state.lock() == Verification::Waiting
    }

    /// Whether it is wanted, and has not come to an end.
    fn is_open(&self) -> bool {
        matches!(
            *self.state.lock(),
            Verification::Waiting | Verification::Running { .. }
        )
    }

    /// Takes in how far it is. What was lost once is not found again.
    fn set(&self, state: Verification) {
        let mut known = self.state.lock();
        let is_final = matches!(*known, Verification::Differs { .. });
        if !is_final || matches!(state, Verification::Differs { .. }) {
            *known = state;
        }
    }
}

impl Core {
    /// Verifies a domain by its keys, which may be used throughout, and notes what is found. True if everything matches.
    pub(crate) fn verify(
        &self,
        domain: &KeyDomain,
        keys: &DomainKeys,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<bool> {
        if !keys.has_roots() {
            domain.trust.set(Verification::Unsupported);
            return Ok(true);
        }
        domain.trust.set(Verification::Running { inodes: 0 });
        let mut findings = 0_u64;
        let asked = |inodes| {
            domain.trust.inodes.store(inodes, Ordering::Relaxed);
            go_on()
        };
        let scanned = scan(&self.store, keys, &asked, &mut |mismatch| {
            findings += 1;
            // At once: whatever becomes of the scan, that much is known.
            domain.trust.is_lost.store(true, Ordering::Release);
            if findings <= LOGGED_MAX {
                alarm(domain.id, mismatch);
            }
        });
        let Scanned { inodes, rows } = match scanned {
            Ok(scanned) => scanned,
            // What cannot be read to its end is not what was written.
            Err(Error::Corrupt { what }) => {
                tracing::error!(domain = domain.id.0, "{what}");
                findings += 1;
                Scanned::default()
            }
            Err(error) => {
                domain.trust.set(match domain.trust.is_lost() {
                    true => Verification::Differs { findings },
                    false => Verification::Waiting,
                });
                return Err(error);
            }
        };
        if findings > 0 {
            domain.trust.is_lost.store(true, Ordering::Release);
            domain.trust.set(Verification::Differs { findings });
            tracing::error!(
                domain = domain.id.0,
                findings,
                "what storage holds is not what was last written: somebody put some of it back as it once was, or removed or added \
                 some; nothing more is changed; 'cmkfs fsck' says which files it is"
            );
            return Ok(false);
        }
        domain.trust.set(Verification::Matches {
            inodes,
            records: rows,
        });
        tracing::info!(
            domain = domain.id.0,
            inodes,
            records = rows,
            "what storage holds is what was last written"
        );
        Ok(true)
    }

    /// Verifies every domain whose keys may be used, before anything is served, if that is wanted. The first of which something
    /// does not match, if there is one.
    pub(crate) fn verify_first(&self) -> Result<Option<Domain>> {
        if self.options.verify != Verify::Full {
            return Ok(None);
        }
        for domain in self.domains.all() {
            let Ok(access) = self.serve(domain.id) else {
                tracing::warn!(
                    domain = domain.id.0,
                    "a key domain that cannot be verified stays dark until the next mount"
                );
                continue;
            };
            if !self.verify(domain, access.keys_of(domain.id)?, &|| access.go_on())? {
                return Ok(Some(domain.id));
            }
        }
        Ok(None)
    }

    /// Waits until every domain whose keys may be used is verified, where that is wanted. False if the volume is being closed.
    pub(crate) fn wait_until_verified(&self) -> bool {
        loop {
            let is_open = |domain: &KeyDomain| domain.trust.is_open() && !self.is_dark(domain.id);
            if !self.domains.all().any(is_open) {
                return true;
            }
            if self.verified_bell.wait(WAIT_MAX) == Wake::Stop {
                return false;
            }
        }
    }

    /// Whether the records of a domain are not those that were written last, or may not be.
    pub(crate) fn is_untrusted(&self, domain: Domain) -> bool {
        let is_open = self
            .domains
            .get(domain)
            .is_ok_and(|domain| domain.trust.is_open());
        is_open || self.refuse_lost(domain).is_err()
    }

    /// Whether a domain is not to be served, since it could not be verified before.
    pub(crate) fn is_unverified(&self, domain: &KeyDomain) -> bool {
        self.options.verify == Verify::Full && domain.trust.is_due()
    }
}

/// The thread that verifies what was not verified before it was served, each domain once.
pub(crate) fn verify_in_background(core: &Core) {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "the thread that verifies stands back for no other");
    }
    loop {
        for domain in core.domains.all().filter(|domain| domain.trust.is_due()) {
            if let Err(error) = verify_one(core, domain) {
                log_failure("verifying", &error);
            }
        }
        core.verified_bell.ring();
        if core.verify_bell.bell.wait(WAIT_MAX) == Wake::Stop {
            return;
        }
    }
}

fn verify_one(core: &Core, domain: &KeyDomain) -> Result<()> {
    // It waits for its keys.
    let Ok(access) = core.serve(domain.id) else {
        return Ok(());
    };
    let go_on = || match core.verify_bell.is_stopped.load(Ordering::Acquire) {
        true => Err(Error::Posix(libc::EINTR)),
        false => access.go_on(),
    };
    match core.verify(domain, access.keys_of(domain.id)?, &go_on) {
        // It begins again another time.
        Err(Error::Posix(libc::EAGAIN | libc::EINTR)) => Ok(()),
        verified => verified.map(|_| ()),
    }
}

fn alarm(domain: Domain, mismatch: Mismatch) {
    let domain = domain.0;
    match mismatch {
        Mismatch::Rows(ino, _) => tracing::error!(
            domain,
            inode = ino.0,
            "the records of an inode are not those that were last written"
        ),
        Mismatch::Record(ino) => {
            tracing::error!(
                domain,
                inode = ino.0,
                "the record of an inode fails authentication"
            )
        }
        Mismatch::Stray(ino) => {
            tracing::error!(
                domain,
                inode = ino.0,
                "there are records of an inode that is not there"
            )
        }
        Mismatch::Unknown => tracing::error!(domain, "there are records that are none of the volume's own"),
        Mismatch::Root(_) => tracing::error!(
            domain,
            "which inodes there are, and what their records say, is not what was last written"
        ),
        Mismatch::NoRoot => tracing::error!(domain, "the root record fails authentication"),
    }
}
