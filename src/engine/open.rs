//! Making a volume, and opening one.

use super::active::Active;
use super::anchor;
use super::batch::Batch;
use super::bell::Bell;
use super::chunkcache::ChunkCache;
use super::clock::{Clock, SystemClock};
use super::commit::{Committer, Counted, Seq, StoredRoot, Written};
use super::core::{Core, Fetch};
use super::domains::{Domains, KeyDomain};
use super::error::{Error, Result};
use super::filekeys::FileKeys;
use super::format::domain::{DomainRecord, DomainState, Usage};
use super::format::root::{Anchors, RootRecord, SealRecord};
use super::format::rowkey::{self, Family};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::format::superblock::{self, Superblock, SuperblockError, Version};
use super::keyring::{KeyState, Keyring, Purpose, VolumeKey, key_failure, state_after};
use super::keys::DomainKeys;
use super::keyservice::{Dependants, IssuedKey, KeyContext, KeyError, KeyService};
use super::namespace::new_record;
use super::node::NodeTable;
use super::orphan::Orphans;
use super::seal;
use super::slots::{Slots, sync_dir};
use super::space::{Limits, Space};
use super::store::{Mode, Store};
use super::sweep::{self, Sweep};
use super::sync::Mutex;
use super::types::{Domain, FileKind, Ino, NewNode};
use super::upkeep::{self, Background, Threads};
use super::verification::{Trust, VerifierBell};
use super::volume::{Options, Volume};
use super::watch::{Lease, RENEWAL_MAX};
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, sync_channel};

const SUPERBLOCK: &str = "superblock";
const META: &str = "meta";
const DATA: &str = "data";
/// Held by flock(2) while the volume is open.
const LOCK: &str = "lock";
/// RocksDB's memory while a volume is made, in bytes.
const CREATE_CACHE_BYTES: usize = 8 << 20;
/// Jobs that may wait for the thread that fetches keys; more are left to be fetched on use.
const FETCHES_MAX: usize = 64;
/// Slack for the first inode numbers: 0 is none, 1 the root directory.
const FIRST_FREE_INO: u64 = 2;

/// What a new volume is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateParams {
    /// The ARN of the CMK.
    pub cmk_arn: String,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
}

/// Why a volume cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    #[error("the volume is mounted already")]
    AlreadyMounted,
    /// There is no superblock.
    #[error("this is no cmkfs volume: it has no superblock")]
    NotAVolume,
    /// It was made by a later version.
    #[error("the volume has format version {found}; this program knows versions up to {known}")]
    FutureFormat {
        /// The volume's version.
        found: u32,
        /// The highest version known here.
        known: u32,
    },
    /// The KMS does not give its key.
    #[error("{0}")]
    Key(#[from] KeyError),
    /// What storage holds is not what was written.
    #[error("the volume is damaged: {0}")]
    Damaged(String),
    /// Storage holds what was written, but not what was written last, of a key domain.
    #[error(
        "what the volume holds{} is not what was last written: some records were put back as they once were, removed or added",
        of_domain(*.0)
    )]
    NotAsWritten(Domain),
    /// The KMS knows that the volume had come further, by so many operations.
    #[error("the volume is older than its last known state: {0} operations missing")]
    Older(u64),
    /// The KMS knows of another history of the volume.
    #[error(
        "the volume is not the one that was mounted last: a copy of it went on elsewhere, or an older one from here"
    )]
    Forked,
    /// Storage failed.
    #[error("{0}")]
    Engine(Error),
}

fn of_domain(domain: Domain) -> String {
    match domain {
        Domain::FIRST => String::new(),
        Domain(number) => format!(" of key domain {number}"),
    }
}

impl From<Error> for OpenError {
    fn from(error: Error) -> Self {
        match error {
            Error::Corrupt { what } => Self::Damaged(format!("{what} fails authentication")),
            other => Self::Engine(other),
        }
    }
}

impl From<SuperblockError> for OpenError {
    fn from(error: SuperblockError) -> Self {
        match error {
            SuperblockError::NotAVolume => Self::NotAVolume,
            SuperblockError::Future(found) => Self::FutureFormat {
                found,
                known: Version::LATEST as u32,
            },
            SuperblockError::Malformed => Self::Damaged("the superblock is malformed".to_owned()),
        }
    }
}

impl Superblock {
    /// Reads the superblock of the volume in `dir`. Nothing in it is authenticated until the volume is opened.
    ///
    /// # Errors
    /// [`OpenError::NotAVolume`], [`OpenError::FutureFormat`], or that it cannot be read.
    pub fn read(dir: &Path) -> std::result::Result<Self, OpenError> {
        let mut bytes = Vec::new();
        let file = File::open(dir.join(SUPERBLOCK));
        let read = file.and_then(|file| file.take(superblock::LENGTH_MAX).read_to_end(&mut bytes));
        read.map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => OpenError::NotAVolume,
            _ => OpenError::Engine(Error::io("read the superblock", &error)),
        })?;
        Ok(Self::decode(&bytes)?)
    }
}

/// Whether anything below the volume's directory may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writing {
    /// As in a mount; in one that is read-only, by RocksDB alone, which recovers its log.
    Allowed,
    /// Nothing but the lock, which is taken.
    Nothing,
}

/// A volume whose background does not run yet.
pub(crate) struct Opened {
    pub(crate) core: Arc<Core>,
    /// For the thread that fetches keys.
    pub(crate) jobs: Receiver<Fetch>,
    /// What the last mount left to be swept.
    pub(crate) sweep: Option<Sweep>,
}

impl Volume {
    /// Makes a volume in `dir`, which is empty or not there, and leaves nothing behind if that fails.
    ///
    /// # Errors
    /// [`Error::Posix`] with ENOTEMPTY; the KMS's refusal to issue a volume key; storage's own.
    pub fn create(dir: &Path, params: &CreateParams, keys: &dyn KeyService, volume: [u8; 16]) -> Result<()> {
        let existed = dir.exists();
        std::fs::create_dir_all(dir).map_err(|error| Error::io("create the volume", &error))?;
        let mut entries = std::fs::read_dir(dir).map_err(|error| Error::io("read the directory", &error))?;
        if entries.next().is_some() {
            return Err(Error::Posix(libc::ENOTEMPTY));
        }
        make(dir, params, keys, volume).inspect_err(|_| {
            for name in [META, DATA] {
                let _gone = std::fs::remove_dir_all(dir.join(name));
            }
            for name in [SUPERBLOCK, LOCK, seal::NAME, seal::NEW_NAME] {
                let _gone = std::fs::remove_file(dir.join(name));
            }
            if !existed {
                let _gone = std::fs::remove_dir(dir);
            }
        })?;
        let made = Dependants {
            inodes: 1,
            bytes: 0,
            is_removed: false,
        };
        if let Err(error) = keys.report(made) {
            tracing::warn!(%error, "the KMS does not know of the volume until it is mounted");
        }
        Ok(())
    }

    /// Opens the volume in `dir` and starts its background threads.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        dir: &Path,
        options: Options,
        keys: Arc<dyn KeyService>,
        clock: Arc<dyn Clock>,
    ) -> std::result::Result<Arc<Self>, OpenError> {
        let opened = open_core(dir, options, keys, clock, Writing::Allowed)?;
        let core = Arc::clone(&opened.core);
        // From here on the keys are watched: what takes long can be revoked.
        let background = upkeep::start(opened, Threads::All)?;
        let volume = Self::with_background(Arc::clone(&core), background);
        let begun = core.begin_serving();
        if begun.is_err()
            && let Err(error) = volume.close()
        {
            tracing::warn!(%error, "a volume that is not served was not put away");
        }
        begun.map(|()| Arc::new(volume))
    }

    pub(crate) fn with_background(core: Arc<Core>, background: Background) -> Self {
        Self {
            core,
            background: Mutex::new(background),
            closed: AtomicBool::new(false),
        }
    }
}

pub(crate) fn open_core(
    dir: &Path,
    options: Options,
    keys: Arc<dyn KeyService>,
    clock: Arc<dyn Clock>,
    writing: Writing,
) -> std::result::Result<Opened, OpenError> {
    let superblock = Superblock::read(dir)?;
    let lock = take_lock(dir, writing)?;
    let volume_key = VolumeKey {
        volume: superblock.volume(),
        version: superblock.format(),
        domain: Domain::FIRST,
        superblock_hash: superblock.hash(),
        wrapped: superblock.wrapped_vk().to_vec(),
    };
    let file_keys = Arc::new(FileKeys::new(options.dek_cache_entries_max));
    let keyring = Keyring::open(keys, volume_key, Arc::clone(&file_keys))?;
    let asked = clock.monotonic();
    let renewal = keyring.renew(RENEWAL_MAX)?;
    renewal.state?;
    let lease = Lease {
        asked,
        length: renewal.lease,
    };
    let meta = dir.join(META);
    let limits = Limits::of(dir)?;
    let space = Arc::new(Space::new(dir, limits));
    let open = |mode| Store::open(&meta, limits.sizes(options.block_cache_bytes), mode);
    let store = Arc::new(match writing {
        Writing::Nothing => open(Mode::ReadOnly)?,
        Writing::Allowed => match open(Mode::Roomy) {
            Err(error) if error.is_no_room() => {
                // A read-only mount takes nothing away, though RocksDB recovers its log.
                if !options.read_only {
                    space.give_up_ballast();
                }
                open(Mode::Tight)?
            }
            store => store?,
        },
    });
    let (mut last, mut sealed) = {
        let admission = keyring.admit(Purpose::Serve)?;
        let sealed = seal::read(dir, admission.keys())?;
        (read_root(&store, admission.keys(), sealed.durable_seq)?, sealed)
    };
    if let Some(seen) = sealed.kms {
        match keyring.expect(seen) {
            Err(KeyError::RolledBack) if options.accept_kms_restore => {
                tracing::warn!("the KMS knows less than this volume has seen of it, which its user accepts");
            }
            other => other?,
        }
    }
    let given_up = {
        let admission = keyring.admit(Purpose::Serve)?;
        let (anchors, given_up) =
            anchor::check(&keyring, admission.keys(), &last.root, sealed.anchors, &options)?;
        sealed.anchors = anchors;
        given_up
    };
    // No number that any history of it has come to is used again.
    let limits = [given_up, sealed.anchors.accepted].into_iter().flatten();
    let limits = limits.map(|anchor| anchor.ino_limit).max();
    last.root.ino_limit = last.root.ino_limit.max(limits.unwrap_or_default());
    let sweep = match options.read_only {
        true => None,
        false => {
            if let Err(error) = space.restore_ballast() {
                tracing::warn!(%error, "the volume goes without ballast for now");
            }
            sweep::begin(dir, &last)?
        }
    };
    let (fetches, jobs) = sync_channel(FETCHES_MAX);
    let core = Arc::new(Core {
        committer: Committer::new(Arc::clone(&store), Arc::clone(&space), last),
        store,
        space,
        domains: Domains::new(KeyDomain::new(
            Domain::FIRST,
            keyring,
            Trust::new(options.verify),
            options.dek_prefetch,
            Some(lease),
        )),
        file_keys,
        slots: Slots::new(dir.join(DATA), writing == Writing::Nothing),
        nodes: NodeTable::new(options.node_cache_entries_max),
        chunks: ChunkCache::new(),
        active: Active::default(),
        orphans: Orphans::default(),
        poisoned: Mutex::default(),
        rename: Mutex::new(()),
        clock,
        observer: Mutex::new(None),
        is_unswept: AtomicBool::new(sweep.is_some()),
        is_restored: AtomicBool::new(given_up.is_some()),
        sealed: Mutex::new(sealed),
        upkeep_bell: Bell::default(),
        is_compaction_due: AtomicBool::new(false),
        compact_bell: Bell::default(),
        verify_bell: VerifierBell::default(),
        verified_bell: Bell::default(),
        domains_bell: Bell::default(),
        fetches,
        dir: dir.to_path_buf(),
        options,
        _lock: lock,
    });
    core.serve(Domain::FIRST)?.directory(Ino::ROOT)?;
    core.open_domains()?;
    for domain in core.domains.all() {
        match core.know_orphans(domain) {
            Err(error) if domain.id == Domain::FIRST => return Err(error.into()),
            // They wait for its key.
            Err(error) => {
                tracing::debug!(domain = domain.id.0, %error, "its unlinked files are not known yet")
            }
            Ok(()) => {}
        }
    }
    Ok(Opened { core, jobs, sweep })
}

impl Core {
    /// What is to be done before anything is served.
    fn begin_serving(&self) -> std::result::Result<(), OpenError> {
        match self.verify_first()? {
            Some(domain) => Err(OpenError::NotAsWritten(domain)),
            None => Ok(self.take_in_restored()?),
        }
    }

    /// Opens every domain but the first that is in use. One whose key may not be used is dark, and keeps nothing from being
    /// opened.
    fn open_domains(&self) -> std::result::Result<(), OpenError> {
        let first = &self.domains.first().keyring;
        let mut found = Vec::new();
        {
            let access = self.serve(Domain::FIRST)?;
            let (from, to) = rowkey::all(Domain::FIRST, rowkey::Kind::Domain);
            self.store.scan(Family::Meta, &from, &to, |key, sealed| {
                let number = rowkey::last_number(key).and_then(|number| u16::try_from(number).ok());
                let record = access.open_row(Ino::ROOT, key, sealed).ok();
                let record = record.and_then(|plain| DomainRecord::decode(&plain).ok());
                let damaged = || Error::Corrupt {
                    what: "the record of a key domain".to_owned(),
                };
                found.push(number.zip(record).ok_or_else(damaged)?);
                Ok(true)
            })?;
        }
        for (number, record) in found {
            let domain = Domain(number);
            if record.state != DomainState::InUse {
                self.domains.note(domain, &record);
                continue;
            }
            let service = first.service().for_domain(domain, &record.cmk_arn)?;
            let volume_key = VolumeKey {
                domain,
                wrapped: record.wrapped_vk.clone(),
                ..first.volume_key().clone()
            };
            let keyring = Keyring::dark(service, volume_key, Arc::clone(&self.file_keys));
            let asked = self.clock.monotonic();
            let lit = keyring.relight().and_then(|()| keyring.renew(RENEWAL_MAX));
            let lit = lit.and_then(|renewal| renewal.state.map(|()| renewal.lease));
            let lease = match lit {
                Ok(length) => Some(Lease { asked, length }),
                Err(error) => {
                    tracing::warn!(domain = number, %error, "a key domain is dark");
                    keyring.go_dark(state_after(&error).unwrap_or(KeyState::Unreachable), |_| ());
                    None
                }
            };
            let trust = Trust::new(self.options.verify);
            let opened = KeyDomain::new(domain, keyring, trust, self.options.dek_prefetch, lease);
            self.domains.add(opened, &record);
        }
        Ok(())
    }
}

fn take_lock(dir: &Path, writing: Writing) -> std::result::Result<File, OpenError> {
    let file = match writing {
        // NFS locks only what may be written; a host that is read-only has nothing that may be.
        Writing::Nothing => OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(LOCK))
            .or_else(|_| File::open(dir.join(LOCK))),
        Writing::Allowed => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(LOCK)),
    };
    let file = file.map_err(|error| OpenError::Engine(Error::io("open the lock file", &error)))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::AlreadyMounted),
        Err(errno) => Err(OpenError::Engine(Error::io("lock the volume", &errno.into()))),
    }
}

fn read_root(store: &Store, keys: &DomainKeys, sealed_seq: u64) -> std::result::Result<Written, OpenError> {
    let key = rowkey::root(keys.domain());
    let row = store
        .get(Family::Meta, &key)?
        .ok_or_else(|| OpenError::Damaged("there is no root record".to_owned()))?;
    let plain = keys.open_row(Family::Meta, &key, &row);
    let root = plain.and_then(|plain| RootRecord::decode(&plain).ok());
    // One without a sum in a volume with sums is of no program that made it.
    let root = root.filter(|root| root.sum.is_some() == keys.has_roots());
    let root = root.ok_or_else(|| OpenError::Damaged("the root record fails authentication".to_owned()))?;
    if root.commit_seq < sealed_seq || root.commit_seq < root.durable_seq {
        return Err(OpenError::Damaged(format!(
            "commit {} was durable, but the log ends at {}",
            sealed_seq.max(root.durable_seq),
            root.commit_seq
        )));
    }
    let mut usage = BTreeMap::new();
    let (from, to) = rowkey::all(Domain::FIRST, rowkey::Kind::Usage);
    store.scan(Family::Meta, &from, &to, |key, sealed| {
        let domain = rowkey::last_number(key).and_then(|number| u16::try_from(number).ok());
        let plain = keys.open_row(Family::Meta, key, sealed);
        let found = plain.and_then(|plain| Usage::decode(&plain).ok());
        let found = found
            .zip(Seal::of_row(sealed))
            .map(|(usage, seal)| Counted { usage, seal });
        let damaged = || Error::Corrupt {
            what: "the count of a key domain".to_owned(),
        };
        let (domain, found) = domain.zip(found).ok_or_else(damaged)?;
        usage.insert(Domain(domain), found);
        Ok(true)
    })?;
    let roots = read_roots(store, usage.keys().copied())?;
    Ok(Written {
        root,
        row,
        usage,
        roots,
    })
}

/// How the root records of domains are stored, which their keys are not needed for.
fn read_roots(
    store: &Store,
    domains: impl Iterator<Item = Domain>,
) -> std::result::Result<BTreeMap<Domain, StoredRoot>, OpenError> {
    let mut roots = BTreeMap::new();
    for domain in domains {
        let row = store.get(Family::Meta, &rowkey::root(domain))?;
        if let Some(seal) = row.and_then(|row| Seal::of_row(&row)) {
            roots.insert(domain, StoredRoot { seal, sum: None });
        }
    }
    Ok(roots)
}

fn make(dir: &Path, params: &CreateParams, service: &dyn KeyService, volume: [u8; 16]) -> Result<()> {
    let domain = Domain::FIRST;
    let superblock_hash = Superblock::new(volume, &params.cmk_arn, Vec::new()).hash();
    let context = KeyContext::VolumeKey {
        volume,
        domain,
        superblock_hash,
    };
    let issued = service
        .issue(&[context])
        .map_err(|error| key_refused(&error))?
        .pop();
    let IssuedKey { wrapped, key } =
        issued.ok_or_else(|| key_refused(&KeyError::Other("no answer for the volume key".to_owned())))?;
    let keys = DomainKeys::new(&key, volume, Version::LATEST, domain)?;

    let _lock = take_lock(dir, Writing::Allowed).map_err(|error| match error {
        OpenError::Engine(error) => error,
        _ => Error::Posix(libc::EBUSY),
    })?;
    Slots::create(&dir.join(DATA))?;
    let durable = make_store(dir, params, &keys)?;
    let sealed = SealRecord {
        durable_seq: durable.0,
        kms: Some(service.position()),
        anchors: Anchors::default(),
    };
    seal::write(dir, &keys, sealed)?;
    // Last, so that a directory with a superblock is a whole volume.
    let bytes = Superblock::new(volume, &params.cmk_arn, wrapped).encode();
    let mut file = File::create_new(dir.join(SUPERBLOCK)).map_err(|error| Error::io("create", &error))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(|error| Error::io("write the superblock", &error))?;
    sync_dir(dir)?;
    dir.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .map_or(Ok(()), sync_dir)
}

fn make_store(dir: &Path, params: &CreateParams, keys: &DomainKeys) -> Result<Seq> {
    let limits = Limits::of(dir)?;
    let store = Arc::new(Store::create(&dir.join(META), limits.sizes(CREATE_CACHE_BYTES))?);
    let root = RootRecord {
        ino_limit: FIRST_FREE_INO,
        sum: keys.has_roots().then(RowSum::default),
        ..RootRecord::default()
    };
    let nothing = Written {
        root,
        row: Vec::new(),
        usage: BTreeMap::new(),
        roots: BTreeMap::new(),
    };
    let committer = Committer::new(Arc::clone(&store), Arc::new(Space::new(dir, limits)), nothing);
    let node = NewNode {
        kind: FileKind::Directory,
        perm: 0o755,
        umask: 0,
        uid: params.uid,
        gid: params.gid,
        rdev: 0,
    };
    let record = new_record(None, Ino::ROOT, &node, SystemClock.now());
    let mut batch = Batch::default();
    let key = rowkey::inode(Ino::ROOT);
    let rows = keys.has_roots().then(RowSum::default);
    let value = keys.seal_row(Family::Meta, &key, &record.encode(rows.as_ref()))?;
    batch.note_replaced(keys, &key, None, Seal::of_row(&value).as_ref());
    batch.put(Family::Meta, key, value);
    batch.count_inodes(Domain::FIRST, 1);
    let seq = committer.commit(keys, batch)?;
    committer.sync_to(seq)?;
    store.flush()?;
    Ok(seq)
}

fn key_refused(error: &KeyError) -> Error {
    key_failure(Ino::ROOT, error)
}
