//! Making a key domain of an empty directory, and ending one: docs/domains.md.

use super::batch::Batch;
use super::commit::Seq;
use super::core::{Access, Core};
use super::domains::{KeyDomain, Known};
use super::error::{Error, Result};
use super::format::dirent::{Dirent, Xattr};
use super::format::domain::{DomainRecord, DomainState, Usage};
use super::format::inode::{ContentState, InodeRecord};
use super::format::rowkey::{self, Family, Table};
use super::keyring::{KeyState, Keyring, VolumeKey, key_failure};
use super::keys::DomainKeys;
use super::keyservice::{Dependants, IssuedKey, KeyError, KeyService};
use super::namespace::{new_record, touch};
use super::node::Node;
use super::staged::Staged;
use super::types::{Domain, FileKind, Ino, NewNode};
use super::verification::{Trust, Verification};
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
    /// Its CMK, as far as the volume's own key lets that be known; none for the volume's own, which the superblock names.
    pub cmk_arn: Option<String>,
    /// Whether its keys may be used.
    pub key_state: KeyState,
    /// The KMS said that its CMK is destroyed, so that what was in it is noise: more than [`KeyState::Erased`] says, which an
    /// unknown key has, too.
    pub is_erased: bool,
    /// Where it begins, from the volume's root, as far as the volume's own key lets that be known. Any bytes but NUL.
    pub path: Option<Vec<u8>>,
    /// Inodes in it.
    pub inodes: u64,
    /// Blocks of 4 KiB in it that are not holes.
    pub blocks: u64,
    /// Whether its records are those that were last written; none if it is not open.
    pub verification: Option<Verification>,
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
    /// What the volume says of a domain but the first.
    pub(crate) fn domain_record(&self, domain: Domain) -> Result<DomainRecord> {
        let plain = self.row(domain.root(), &rowkey::domain(domain))?;
        let record = plain.and_then(|plain| DomainRecord::decode(&plain).ok());
        record.ok_or_else(|| Error::Corrupt {
            what: format!("the record of key domain {}", domain.0),
        })
    }

    pub(crate) fn put_domain(&self, batch: &mut Batch, domain: Domain, record: &DomainRecord) -> Result<()> {
        let key = rowkey::domain(domain);
        let old = self.stored_seal(&key)?;
        self.put_row(batch, key, &record.encode(), old.as_ref())
            .map(|_| ())
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
            other => match self.domains.known(other) {
                Some(known) if known.state == DomainState::Erased => None,
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

    /// Puts the root of a new domain in the place of an empty directory, under its name, with its attributes; and has it
    /// `added` before anybody can find it.
    fn begin_domain(
        &self,
        site: &Site,
        domain: Domain,
        record: &DomainRecord,
        added: impl FnOnce(),
    ) -> Result<()> {
        let name = record.name.as_slice();
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
        let mut released = None;
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
                released = Some(self.release_name(&mut batch, site.old.domain())?);
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
        self.put_inode(&mut batch, root, &made, None)?;
        self.put_domain(&mut batch, domain, record)?;
        batch.count_inodes(Domain::FIRST, 1);
        let usage = Usage {
            ino_limit: root.0 + 1,
            inodes: 1,
            blocks: 0,
        };
        batch.set_usage(domain, Some(usage));
        touch(staged.record(parent)?, now);
        staged.commit(self, batch)?;
        if let Some(record) = released {
            self.domains.note(site.old.domain(), &record);
        }
        added();
        Ok(())
    }

    /// Has an erased domain's record say that it has no name any more. That record, which is to be noted.
    fn release_name(&self, batch: &mut Batch, domain: Domain) -> Result<DomainRecord> {
        let record = self.domain_record(domain)?.without_name();
        self.put_domain(batch, domain, &record)?;
        Ok(record)
    }

    /// The path of a directory of the first domain, from the volume's root, which is empty. Looks through every directory above it.
    fn path_of(&self, dir: Ino) -> Result<Vec<u8>> {
        let mut parts = Vec::new();
        let mut at = dir;
        while at != Ino::ROOT {
            let above = self.directory(at)?.state.read().record.parent;
            let mut found = None;
            self.entries::<Dirent>(Table::Dirents, above, 0, |_, entry| {
                self.go_on()?;
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

impl Core {
    /// Puts an empty directory, `name` in `parent`, under another CMK. Durable once that commit is.
    pub(crate) fn set_key(&self, parent: Ino, name: &[u8], cmk_arn: &str) -> Result<(Domain, Seq)> {
        // No gate is held while the KMS is asked.
        let _one_at_a_time = self.domains.making.lock();
        self.change(Domain::FIRST)?.site(parent, name)?;
        let domain = self.domains.next()?;
        let refused = |error: KeyError| key_failure(domain.root(), &error);
        let first = &self.domains.first().keyring;
        let service = first.service().for_domain(domain, cmk_arn).map_err(refused)?;
        let made = self.make_domain(&service, domain, (parent, name), cmk_arn);
        if made.is_err() {
            // It holds a key, and nobody would give that up for it.
            service.end();
        }
        Ok((domain, made?))
    }

    fn make_domain(
        &self,
        service: &Arc<dyn KeyService>,
        domain: Domain,
        (parent, name): (Ino, &[u8]),
        cmk_arn: &str,
    ) -> Result<Seq> {
        let refused = |error: KeyError| key_failure(domain.root(), &error);
        let first = self.domains.first().keyring.volume_key();
        let volume_key = VolumeKey {
            domain,
            wrapped: Vec::new(),
            ..first.clone()
        };
        let issued = service.issue(&[volume_key.context()]).map_err(refused)?.pop();
        let none = || refused(KeyError::Other("no answer for the volume key".to_owned()));
        let IssuedKey { wrapped, key } = issued.ok_or_else(none)?;
        let keys = Arc::new(DomainKeys::new(
            &key,
            volume_key.volume,
            volume_key.version,
            domain,
        )?);
        let asked = self.clock.monotonic();
        let renewal = service.renew(RENEWAL_MAX).map_err(refused)?;
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
            wrapped_vk: wrapped.clone(),
        };
        let volume_key = VolumeKey {
            wrapped,
            ..volume_key
        };
        let files = Arc::clone(&self.file_keys);
        let keyring = Keyring::lit(Arc::clone(service), volume_key, Arc::clone(&keys), files);
        let trust = Trust::of_new();
        let made = KeyDomain::new(domain, keyring, trust, self.options.dek_prefetch, Some(lease));
        made.begin_orphans();
        let access = self.change(Domain::FIRST)?;
        self.take_room_to_grow()?;
        let site = access.site(parent, name)?;
        let wide = access.reach_new(keys);
        wide.begin_domain(&site, domain, &record, || self.domains.add(made, &record))?;
        if let Some(node) = site.node {
            self.orphaned(node.ino);
        }
        Ok(self.committer.committed())
    }

    /// Removes the name of an erased domain. Durable when this returns.
    ///
    /// # Errors
    /// EBUSY for a domain that is not erased; EINVAL for what begins none.
    pub(crate) fn remove_erased(&self, parent: Ino, name: &[u8]) -> Result<()> {
        if parent.domain() != Domain::FIRST {
            return Err(Error::Posix(libc::EINVAL));
        }
        let access = self.change(Domain::FIRST)?;
        let dir = access.directory(parent)?;
        let mut staged = Staged::lock(&[&dir]);
        let (place, entry) = access.entry(parent, name)?;
        let domain = entry.ino.domain();
        if domain == Domain::FIRST {
            return Err(Error::Posix(libc::EINVAL));
        }
        let is_erased = |known: Known| known.state == DomainState::Erased;
        if !self.domains.known(domain).is_some_and(is_erased) {
            return Err(Error::Posix(libc::EBUSY));
        }
        let mut batch = Batch::default();
        access.remove_entry::<Dirent>(&mut batch, Table::Dirents, parent, place, false)?;
        let changed = staged.record(parent)?;
        changed.children = changed.children.saturating_sub(1);
        changed.nlink = changed.nlink.saturating_sub(1);
        touch(changed, self.now());
        let record = access.release_name(&mut batch, domain)?;
        staged.commit(&access, batch)?;
        self.domains.note(domain, &record);
        drop(staged);
        self.committer.sync_to(self.committer.committed())
    }

    /// Ends what is to be ended: domains whose CMK is destroyed, and those that earlier mounts did not end to the last.
    pub(crate) fn end_domains(&self) -> Result<()> {
        let mut outcome = Ok(());
        for (domain, known) in self.domains.all_known() {
            let open = self.domains.get(domain).ok();
            let is_over = match known.state {
                DomainState::InUse => {
                    open.is_some_and(|open| open.is_destroyed() && open.keyring.state() == KeyState::Erased)
                }
                DomainState::Erased => true,
                // What is open in it is there until the next mount.
                DomainState::Removed => open.is_none(),
            };
            if is_over && self.committer.usage(domain).is_some() {
                outcome = outcome.and(self.end_domain(domain));
            }
        }
        outcome
    }

    /// Gives up everything in a domain, without a key of it.
    fn end_domain(&self, domain: Domain) -> Result<()> {
        if self.domains.known(domain).map(|known| known.state) == Some(DomainState::InUse) {
            self.mark_erased(domain)?;
        }
        let Some(usage) = self.committer.usage(domain) else {
            return Ok(());
        };
        if usage.inodes > 0 {
            let (inodes, blocks) = (usage.inodes, usage.blocks);
            tracing::warn!(
                domain = domain.0,
                inodes,
                blocks,
                "what a key domain held is given up"
            );
        }
        let mut batch = Batch::default();
        let (from, to) = rowkey::all_rows(domain);
        batch.delete_range(Family::Meta, from, to);
        let (from, to) = rowkey::all_content(domain);
        batch.delete_range(Family::Content, from, to);
        batch.end_domain(domain);
        batch.discount(usage);
        // Of what is to be removed still: slot files.
        let nothing = Usage {
            inodes: 0,
            blocks: 0,
            ..usage
        };
        batch.set_usage(domain, Some(nothing));
        let seq = self.drain(Domain::FIRST)?.commit(batch)?;
        self.committer.sync_to(seq)?;
        self.orphans.drop_all(|ino| ino.domain() == domain);
        // Of every file that there is: no gate is held so long.
        self.slots
            .remove_all(domain, || match self.domains_bell.is_stopped() {
                true => Err(Error::Posix(libc::EINTR)),
                false => Ok(()),
            })?;
        let mut batch = Batch::default();
        batch.set_usage(domain, None);
        self.drain(Domain::FIRST)?.commit(batch)?;
        self.is_compaction_due.store(true, Ordering::Release);
        self.compact_bell.ring();
        if let Ok(open) = self.domains.get(domain)
            && let Err(error) = open.keyring.service().report(Dependants::NONE)
        {
            tracing::debug!(%error, "the KMS was not told that nothing depends on the key any more");
        }
        Ok(())
    }

    /// From here on a domain is never opened again.
    fn mark_erased(&self, domain: Domain) -> Result<()> {
        let access = self.drain(Domain::FIRST)?;
        // Nobody else changes it now: a rename of its root and a removal need its keys.
        let record = DomainRecord {
            state: DomainState::Erased,
            ..access.domain_record(domain)?
        };
        let mut batch = Batch::default();
        access.put_domain(&mut batch, domain, &record)?;
        let seq = access.commit(batch)?;
        self.domains.note(domain, &record);
        drop(access);
        self.committer.sync_to(seq)
    }

    /// The domains that are in use, or whose name is still there; where they are, and under which CMKs, if there is `access`.
    pub(crate) fn domain_statuses(&self, access: Option<&Access<'_>>) -> Vec<DomainStatus> {
        let state_of = |domain: &KeyDomain| match access.map(|access| access.keys_of(domain.id)) {
            // Its gate is held.
            Some(Ok(_)) => KeyState::Live,
            _ => domain.keyring.state(),
        };
        let bare = |domain, key_state| {
            let holds = self.committer.holds(domain);
            DomainStatus {
                domain,
                cmk_arn: None,
                key_state,
                is_erased: false,
                path: None,
                inodes: holds.inodes,
                blocks: holds.blocks,
                verification: self
                    .domains
                    .get(domain)
                    .ok()
                    .map(|open| open.trust.verification()),
            }
        };
        let mut statuses = vec![DomainStatus {
            path: Some(b"/".to_vec()),
            ..bare(Domain::FIRST, state_of(self.domains.first()))
        }];
        for (domain, known) in self.domains.all_known() {
            if !known.is_named {
                continue;
            }
            let open = self.domains.get(domain).ok();
            let is_erased =
                known.state == DomainState::Erased || open.is_some_and(|open| open.is_destroyed());
            let record = access.and_then(|access| access.domain_record(domain).ok());
            let path = record.as_ref().and_then(|record| {
                let above = access?.path_of(record.parent).ok()?;
                Some([above.as_slice(), b"/", &record.name].concat())
            });
            statuses.push(DomainStatus {
                cmk_arn: record.map(|record| record.cmk_arn),
                is_erased,
                path,
                ..bare(domain, open.map_or(KeyState::Erased, state_of))
            });
        }
        statuses
    }
}
