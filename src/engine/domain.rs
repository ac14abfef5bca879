//! Making a key domain of an empty directory, and ending one: docs/domains.md.

use super::commit::Batch;
use super::core::{Access, Core};
use super::domains::KeyDomain;
use super::error::{Error, Result};
use super::format::dirent::{Dirent, Xattr};
use super::format::domain::{DomainRecord, DomainState, Usage};
use super::format::inode::{ContentState, InodeRecord};
use super::format::rowkey::{self, Family, Table};
use super::keyring::{KeyState, Keyring, VolumeKey, key_failure};
use super::keys::DomainKeys;
use super::keyservice::{Dependants, IssuedKey, KeyError};
use super::namespace::{new_record, touch};
use super::node::Node;
use super::staged::Staged;
use super::types::{Domain, FileKind, Ino, NewNode};
use super::watch::{Lease, RENEWAL_MAX};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A directory's mode where there is none to take over.
const NEW_PERM: u16 = 0o700;

/// What an operator wants to know of a key domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainStatus {
    /// Its number; 0 is the volume's own.
    pub domain: Domain,
    /// Its CMK; none for the volume's own, which the superblock names.
    pub cmk_arn: Option<String>,
    /// Whether its keys may be used.
    pub key_state: KeyState,
    /// Where it begins, from the volume's root, as far as the volume's own key lets that be known. Any bytes but NUL.
    pub path: Option<Vec<u8>>,
    /// Inodes in it.
    pub inodes: u64,
    /// Blocks of 4 KiB in it that are not holes.
    pub blocks: u64,
}

/// An empty directory that is to begin a domain.
struct Site {
    dir: Arc<Node>,
    /// What the name leads to now.
    old: Ino,
    /// Absent where an erased domain was.
    node: Option<Arc<Node>>,
}

impl Access<'_> {
    pub(crate) fn put_domain(&self, batch: &mut Batch, domain: Domain, record: &DomainRecord) -> Result<()> {
        self.put_row(batch, rowkey::domain(domain), &record.encode())
    }

    /// Finds what is to begin a domain.
    ///
    /// # Errors
    /// EINVAL below another domain; ENOTDIR, ENOTEMPTY; EEXIST for what begins one.
    fn site(&self, parent: Ino, name: &[u8]) -> Result<Site> {
        if parent.domain() != Domain::FIRST {
            return Err(Error::Posix(libc::EINVAL));
        }
        let dir = self.directory(parent)?;
        let entry = {
            let _held = dir.state.read();
            self.entry(parent, name)?.1
        };
        if entry.kind != FileKind::Directory {
            return Err(Error::Posix(libc::ENOTDIR));
        }
        let node = match entry.ino.domain() {
            Domain::FIRST => Some(self.node(entry.ino)?),
            other => match self.domains.record(other) {
                Some(record) if record.state == DomainState::Erased => None,
                _ => return Err(Error::Posix(libc::EEXIST)),
            },
        };
        let is_empty = |node: &Arc<Node>| node.state.read().record.children == 0;
        if node.as_ref().is_some_and(|node| !is_empty(node)) {
            return Err(Error::Posix(libc::ENOTEMPTY));
        }
        Ok(Site {
            dir,
            old: entry.ino,
            node,
        })
    }

    /// Puts the root of a new domain in the place of an empty directory, under its name, with its attributes.
    fn begin_domain(&self, site: &Site, name: &[u8], domain: Domain, record: &DomainRecord) -> Result<()> {
        let parent = site.dir.ino;
        let mut nodes = vec![&site.dir];
        nodes.extend(&site.node);
        let mut staged = Staged::lock(&nodes);
        let (place, entry) = self.entry(parent, name)?;
        // It may be another by now.
        if entry.ino != site.old {
            return Err(Error::Posix(libc::EBUSY));
        }
        let now = self.now();
        let mut batch = Batch::default();
        let mut xattrs = Vec::new();
        let made = match &site.node {
            Some(old) => {
                let found = staged.state(old.ino)?.record.clone();
                if found.children > 0 {
                    return Err(Error::Posix(libc::ENOTEMPTY));
                }
                self.entries::<Xattr>(Table::Xattrs, old.ino, 0, |_, xattr| {
                    xattrs.push(xattr);
                    Ok(true)
                })?;
                self.drop_link(&mut batch, &mut staged, old.ino, now)?;
                found
            }
            None => {
                self.release_name(&mut batch, site.old.domain())?;
                let above = &staged.state(parent)?.record;
                let node = NewNode {
                    kind: FileKind::Directory,
                    perm: NEW_PERM,
                    umask: 0,
                    uid: above.uid,
                    gid: above.gid,
                    rdev: 0,
                };
                new_record(Some(above), parent, &node, now)
            }
        };
        let root = domain.root();
        let made = InodeRecord {
            nlink: 2,
            content: ContentState::default(),
            ctime: now,
            crtime: now,
            parent,
            children: 0,
            xattrs: xattrs.len() as u32,
            ..made
        };
        let entry = Dirent {
            ino: root,
            kind: FileKind::Directory,
            name: name.to_vec(),
        };
        self.put_entry(&mut batch, Table::Dirents, parent, place, entry)?;
        self.put_first_entries(&mut batch, Table::Xattrs, root, xattrs)?;
        self.put_inode(&mut batch, root, &made)?;
        self.put_domain(&mut batch, domain, record)?;
        batch.count_inodes(Domain::FIRST, 1);
        let usage = Usage {
            ino_limit: root.0 + 1,
            inodes: 1,
            blocks: 0,
        };
        batch.set_usage(domain, Some(usage));
        touch(staged.record(parent)?, now);
        staged.commit(self, batch)
    }

    /// Has an erased domain's record say that it has no name any more.
    fn release_name(&self, batch: &mut Batch, domain: Domain) -> Result<()> {
        let record = self.domains.record(domain);
        let record = record.ok_or_else(|| Error::corrupt_inode(domain.root()))?;
        self.put_domain(batch, domain, &nameless(record))
    }

    /// The path of a directory of the first domain, from the volume's root, which is empty. Looks through every directory above it.
    fn path_of(&self, dir: Ino) -> Result<Vec<u8>> {
        let mut parts = Vec::new();
        let mut at = dir;
        while at != Ino::ROOT {
            let above = self.directory(at)?.state.read().record.parent;
            let mut found = None;
            self.entries::<Dirent>(Table::Dirents, above, 0, |_, entry| {
                if entry.ino == at {
                    found = Some(entry.name);
                }
                Ok(found.is_none())
            })?;
            parts.push(found.ok_or(Error::Posix(libc::ENOENT))?);
            at = above;
        }
        parts.push(Vec::new());
        parts.reverse();
        Ok(parts.join(&b'/'))
    }
}

fn nameless(record: DomainRecord) -> DomainRecord {
    DomainRecord {
        parent: Ino::default(),
        name: Vec::new(),
        ..record
    }
}

impl Core {
    /// Puts an empty directory, `name` in `parent`, under another CMK. Durable when this returns.
    pub(crate) fn set_key(&self, parent: Ino, name: &[u8], cmk_arn: &str) -> Result<Domain> {
        let access = self.change(Domain::FIRST)?;
        let _one_at_a_time = self.domains.making.lock();
        let site = access.site(parent, name)?;
        self.take_room_to_grow()?;
        let domain = self.domains.next()?;
        let refused = |error: KeyError| key_failure(domain.root(), &error);
        let first = &self.domains.first().keyring;
        let service = first.service().for_domain(domain, cmk_arn).map_err(refused)?;
        let volume_key = VolumeKey {
            domain,
            wrapped: Vec::new(),
            ..first.volume_key().clone()
        };
        let issued = service.issue(&[volume_key.context()]).map_err(refused)?.pop();
        let none = || refused(KeyError::Other("no answer for the volume key".to_owned()));
        let IssuedKey { wrapped, key } = issued.ok_or_else(none)?;
        let volume = volume_key.volume;
        let keys = Arc::new(DomainKeys::new(&key, volume, domain)?);
        let volume_key = VolumeKey {
            wrapped: wrapped.clone(),
            ..volume_key
        };
        let files_max = self.options.dek_cache_entries_max;
        let keyring = Keyring::lit(service, volume_key, Arc::clone(&keys), files_max);
        let asked = self.clock.monotonic();
        let renewal = keyring.renew(RENEWAL_MAX).map_err(refused)?;
        renewal.state.map_err(refused)?;
        let lease = Lease {
            asked,
            length: renewal.lease,
        };
        let record = DomainRecord {
            state: DomainState::InUse,
            parent,
            name: name.to_vec(),
            cmk_arn: cmk_arn.to_owned(),
            wrapped_vk: wrapped,
        };
        access
            .reach_new(keys)
            .begin_domain(&site, name, domain, &record)?;
        let committed = self.committer.committed();
        let made = KeyDomain::new(domain, keyring, self.options.dek_prefetch, Some(lease));
        made.begin_orphans();
        self.domains.add(made, record);
        match site.node {
            Some(node) => self.orphaned(node.ino),
            None => {
                let old = site.old.domain();
                if let Some(record) = self.domains.record(old) {
                    self.domains.note(old, nameless(record));
                }
            }
        }
        self.committer.sync_to(committed)?;
        Ok(domain)
    }

    /// Removes the name of an erased domain. Durable when this returns.
    ///
    /// # Errors
    /// EBUSY for a domain that is not erased; EINVAL for what begins none.
    pub(crate) fn remove_erased(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let access = self.change(Domain::FIRST)?;
        let _one_at_a_time = self.domains.making.lock();
        let dir = access.directory(parent)?;
        let mut staged = Staged::lock(&[&dir]);
        let (place, entry) = access.entry(parent, name)?;
        let domain = entry.ino.domain();
        let record = match self.domains.record(domain) {
            Some(record) if record.state == DomainState::Erased => record,
            Some(_) if domain != parent.domain() => return Err(Error::Posix(libc::EBUSY)),
            _ => return Err(Error::Posix(libc::EINVAL)),
        };
        let mut batch = Batch::default();
        access.remove_entry::<Dirent>(&mut batch, Table::Dirents, parent, place, false)?;
        let changed = staged.record(parent)?;
        changed.children = changed.children.saturating_sub(1);
        changed.nlink = changed.nlink.saturating_sub(1);
        touch(changed, self.now());
        access.release_name(&mut batch, domain)?;
        staged.commit(&access, batch)?;
        drop(staged);
        self.domains.note(domain, nameless(record));
        self.committer.sync_to(self.committer.committed())
    }

    /// Ends what is to be ended: domains whose CMK is destroyed, and those that earlier mounts did not end to the last.
    pub(crate) fn end_domains(&self) -> Result<()> {
        let mut outcome = Ok(());
        for (domain, record) in self.domains.records() {
            let open = self.domains.get(domain).ok();
            let is_over = match record.state {
                DomainState::InUse => {
                    open.is_some_and(|open| open.is_destroyed() && open.keyring.state() == KeyState::Erased)
                }
                DomainState::Erased => true,
                // What is open in it is there until the next mount.
                DomainState::Removed => open.is_none(),
            };
            if is_over && self.committer.usage(domain).is_some() {
                outcome = outcome.and(self.end_domain(domain, record));
            }
        }
        outcome
    }

    /// Gives up everything in a domain, without a key of it.
    fn end_domain(&self, domain: Domain, record: DomainRecord) -> Result<()> {
        let access = self.drain(Domain::FIRST)?;
        let Some(usage) = self.committer.usage(domain) else {
            return Ok(());
        };
        if record.state == DomainState::InUse {
            let mut batch = Batch::default();
            let record = DomainRecord {
                state: DomainState::Erased,
                ..record
            };
            access.put_domain(&mut batch, domain, &record)?;
            let seq = access.commit(batch)?;
            self.committer.sync_to(seq)?;
            self.domains.note(domain, record);
        }
        tracing::warn!(
            domain = domain.0,
            inodes = usage.inodes,
            blocks = usage.blocks,
            "what was under a key that is gone is given up"
        );
        let mut batch = Batch::default();
        let (from, to) = rowkey::all_rows(domain);
        batch.delete_range(Family::Meta, from, to);
        let (from, to) = rowkey::all_content(domain);
        batch.delete_range(Family::Content, from, to);
        batch.discount(usage);
        // Of what is to be removed still: slot files.
        let nothing = Usage {
            inodes: 0,
            blocks: 0,
            ..usage
        };
        batch.set_usage(domain, Some(nothing));
        let seq = access.commit(batch)?;
        self.committer.sync_to(seq)?;
        self.orphans.drop_all(|ino| ino.domain() == domain);
        self.slots.remove_all(domain)?;
        let mut batch = Batch::default();
        batch.set_usage(domain, None);
        access.commit(batch)?;
        drop(access);
        self.is_compaction_due.store(true, Ordering::Release);
        self.compact_bell.ring();
        if let Ok(open) = self.domains.get(domain)
            && let Err(error) = open.keyring.service().report(Dependants::NONE)
        {
            tracing::debug!(%error, "the KMS was not told that nothing depends on the key any more");
        }
        Ok(())
    }

    /// The domains that are in use, or whose name is still there; their paths if there is `access`.
    pub(crate) fn domain_statuses(&self, access: Option<&Access<'_>>) -> Vec<DomainStatus> {
        let state_of = |domain: &KeyDomain| match access.map(|access| access.keys_of(domain.id)) {
            // Its gate is held.
            Some(Ok(_)) => KeyState::Live,
            _ => domain.keyring.state(),
        };
        let status = |domain, cmk_arn, key_state, path| {
            let holds = self.committer.holds(domain);
            DomainStatus {
                domain,
                cmk_arn,
                key_state,
                path,
                inodes: holds.inodes,
                blocks: holds.blocks,
            }
        };
        let first = state_of(self.domains.first());
        let mut statuses = vec![status(Domain::FIRST, None, first, Some(b"/".to_vec()))];
        for (domain, record) in self.domains.records() {
            if record.name.is_empty() || record.state == DomainState::Removed {
                continue;
            }
            let key_state = match (record.state, self.domains.get(domain)) {
                (DomainState::InUse, Ok(open)) => state_of(open),
                _ => KeyState::Erased,
            };
            let above = access.and_then(|access| access.path_of(record.parent).ok());
            let path = above.map(|above| [above.as_slice(), b"/", &record.name].concat());
            statuses.push(status(domain, Some(record.cmk_arn), key_state, path));
        }
        statuses
    }
}
