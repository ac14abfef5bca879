//! Steps 1 to 4: markers are written, the key is taken away under load, everything is searched, the key is given back.

use super::copies::{Collector, copy};
use super::document::{Check, Outcome};
use super::kms::Kms;
use super::markers::{Kind, Markers};
use super::observer::boottime_ns;
use super::report::{Findings, Phase};
use super::scratch::{Scratch, wait_until};
use super::timeline::{Access, Darkness, Record};
use super::watch::Watch;
use super::{Progress, Request, facts, pause};
use secret_search::{Findings as Found, Needles, exposure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Who watches, where the drill is root's: the one who owns nothing.
pub(super) const NOBODY: u32 = 65_534;
/// How long the loops run before the key is taken away, and in a hurry after that.
const WARM_UP: Duration = Duration::from_millis(400);
const HOT: Duration = Duration::from_millis(250);
/// Searches of a process before something counts as staying.
const SEARCHES_MAX: usize = 5;
/// Windows of one file that are looked for in memory, and in a volume.
const WINDOWS_IN_MEMORY: usize = 64;
const WINDOWS_IN_VOLUME: usize = 4096;

/// A drill under way.
pub(super) struct Course<'r> {
    pub(super) request: &'r Request,
    pub(super) markers: Markers,
    pub(super) findings: Findings,
    show: &'r mut dyn FnMut(Progress<'_>),
}

/// Between the return of the call that took the key away and the one that gives it back.
pub(super) struct Dark {
    name: &'static str,
    before: Option<(u64, &'static str)>,
    called_ns: u64,
    returned_ns: u64,
}

impl<'r> Course<'r> {
    pub(super) fn new(request: &'r Request, show: &'r mut dyn FnMut(Progress<'_>)) -> Self {
        let markers = Markers::new(request.nonce, request.large_bytes);
        let mut findings = Findings {
            facts: facts::of_run(request),
            limits: facts::limits(),
            ..Findings::default()
        };
        findings.markers = Kind::ALL.map(|kind| markers.expected(kind)).to_vec();
        Self {
            request,
            markers,
            findings,
            show,
        }
    }

    /// Everything that was found.
    pub(super) fn end(mut self) -> Findings {
        facts::end(&mut self.findings.facts);
        self.findings
    }

    pub(super) fn step(&mut self, number: u8, title: &str) {
        (self.show)(Progress::Step(number, title));
    }

    pub(super) fn doing(&mut self, what: &str) {
        (self.show)(Progress::Doing(what));
    }

    fn note(&mut self, id: &'static str, step: u8, claim: &str, (outcome, detail): (Outcome, String)) {
        let check = Check {
            id,
            step: Some(step),
            claim: claim.to_owned(),
            outcome,
            detail,
        };
        (self.show)(Progress::Checked(&check));
        self.findings.checks.push(check);
    }

    /// Notes whether a claim held, and what was seen.
    pub(super) fn check(&mut self, id: &'static str, step: u8, claim: &str, seen: Result<String, String>) {
        let outcome = match seen {
            Ok(detail) => (Outcome::Pass, detail),
            Err(detail) => (Outcome::Fail, detail),
        };
        self.note(id, step, claim, outcome);
    }

    /// Notes that nothing is known of a claim, and why.
    pub(super) fn not_tested(&mut self, id: &'static str, step: u8, claim: &str, why: &str) {
        self.note(id, step, claim, (Outcome::NotTested, why.to_owned()));
    }

    pub(super) fn on_scratch(&mut self, scratch: &mut Scratch) -> Result<(), String> {
        self.step(1, "a keystore, a key, a volume; markers written and read");
        self.findings
            .facts
            .insert("tool".to_owned(), facts::tool(Some(scratch.programs())));
        scratch.start_kmsd()?;
        let key = scratch.kms()?.create_key("the key of a drill")?;
        scratch.create_volume(&key.key_id)?;
        let collector = self.collect(scratch)?;
        scratch.mount()?;
        let dir = scratch.mountpoint().join("drill");
        let mut watch = self.begin_watch(&scratch.programs().cmkfs.clone(), &dir, "plant")?;
        self.readable(
            &mut watch,
            ("markers-written", 1, "what was written is read back"),
        )?;
        let keystore = scratch.kms()?.keystore()?;
        facts::of_key(&mut self.findings.facts, &key, &keystore);

        self.take_copy(scratch, "before")?;
        let needles = self.needles(scratch)?;
        let pids = [scratch.mount_pid()?, scratch.kmsd_pid()?];
        self.seen_before(&mut watch, &needles, pids)?;

        self.step(2, "the key is taken away under load");
        let dark = self.darken("live", &mut watch, &scratch.kms()?, &key.key_id, None)?;
        self.step(3, "what is left is searched");
        self.gone_after(&needles, pids)?;
        self.search_volume(&scratch.volume(), Some(&scratch.path("copies")))?;
        self.storage_of_memory(&pids, "either daemon");
        self.bypasses(&scratch.mountpoint());
        self.take_copy(scratch, "disabled")?;
        self.step(4, "the key is given back");
        self.lighten(dark, watch, &scratch.kms()?, &key.key_id)?;

        self.step(
            2,
            "the key is taken away from a mount that is stopped, and from one that was killed",
        );
        for (name, signal, what) in [
            (
                "stopped",
                rustix::process::Signal::STOP,
                "the mount's process was stopped (SIGSTOP)",
            ),
            (
                "killed",
                rustix::process::Signal::KILL,
                "the mount's process was killed (SIGKILL)",
            ),
        ] {
            let cmkfs = scratch.programs().cmkfs.clone();
            let mut watch = self.begin_watch(&cmkfs, &dir, "open")?;
            pause(WARM_UP)?;
            let at_ns = boottime_ns();
            scratch.signal_mount(signal)?;
            // What was killed is fenced without being asked: the call comes before that.
            if name == "stopped" {
                pause(HOT)?;
            }
            let before = Some((at_ns, what));
            let dark = self.darken(name, &mut watch, &scratch.kms()?, &key.key_id, before)?;
            self.close(dark, watch, None)?;
            let status = scratch.mount_end()?;
            self.doing(&format!("the mount's process ended: {status}"));
            scratch.detach();
            scratch.kms()?.enable(&key.key_id)?;
            scratch.mount()?;
            let mut watch = self.begin_watch(&cmkfs, &dir, "open")?;
            let ids = match name {
                "stopped" => (
                    "restored-after-stop",
                    4,
                    "after a stopped mount every byte is back",
                ),
                _ => (
                    "restored-after-kill",
                    4,
                    "after a killed mount every byte is back",
                ),
            };
            self.readable(&mut watch, ids)?;
        }
        self.destroy(scratch, &key.key_id, collector)?;
        self.hardware();
        Ok(())
    }

    fn collect(&self, scratch: &Scratch) -> Result<Collector, String> {
        let (keystore, volume) = (scratch.keystore(), scratch.volume());
        let dirs = vec![keystore.join("db"), volume.join("meta"), keystore, volume];
        // What is in use as a lock, or is no file of the format; slots are withheld.
        let leaves_out = |name: &str| name == "audit.log" || is_lock(name) || is_slot(name);
        Collector::start(dirs, scratch.path("copies/collected"), leaves_out)
            .map_err(|error| format!("the files cannot be collected: {error}"))
    }

    /// Copies keystore and volume; of the keystore the root slots apart.
    pub(super) fn take_copy(&mut self, scratch: &Scratch, moment: &str) -> Result<(), String> {
        self.doing(&format!("copying keystore and volume: {moment}"));
        let failed = |error: std::io::Error| format!("the copy '{moment}': {error}");
        let to = scratch.path("copies").join(moment);
        // The current slot is anybody's who has the keystore; what is withheld is the one before.
        copy(&scratch.keystore(), &to.join("keystore"), is_slot).map_err(failed)?;
        copy(&scratch.volume(), &to.join("volume"), |_| false).map_err(failed)?;
        if moment == "before" {
            let withheld = scratch.path("withheld").join("slot-1");
            std::fs::copy(scratch.keystore().join("slot-1"), withheld).map_err(failed)?;
        }
        Ok(())
    }

    /// Starts an observer in `dir`.
    pub(super) fn begin_watch(&mut self, cmkfs: &Path, dir: &Path, order: &str) -> Result<Watch, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
        let is_root = rustix::process::geteuid().is_root();
        if order == "plant" {
            std::fs::create_dir(dir).map_err(failed)?;
            if is_root {
                std::os::unix::fs::chown(dir, Some(NOBODY), Some(NOBODY)).map_err(failed)?;
            }
        }
        let mut watch = Watch::start(cmkfs, dir, is_root.then_some(NOBODY))?;
        watch.take_up(order, &self.markers)?;
        watch.tell("start")?;
        self.doing(&format!("the observer is process {}", watch.pid()));
        Ok(watch)
    }

    /// Checks that every byte can be read in every way.
    pub(super) fn readable(
        &mut self,
        watch: &mut Watch,
        (id, step, claim): (&'static str, u8, &str),
    ) -> Result<(), String> {
        let mut seen = String::new();
        let waited = wait_until("every byte can be read", || {
            seen = watch.tell("checksums")?.concat();
            Ok(self.compare(&seen).is_ok())
        });
        let compared = self.compare(&seen);
        self.check(id, step, claim, compared.and_then(|said| waited.map(|()| said)));
        Ok(())
    }

    /// Compares an observer's checksums with what must be read.
    fn compare(&self, seen: &str) -> Result<String, String> {
        let mut sums = 0;
        let mut handles = 0;
        let by_name: BTreeMap<&str, &str> = self
            .findings
            .markers
            .iter()
            .map(|marker| (marker.kind.name(), marker.sha256.as_str()))
            .collect();
        for file in seen.split(';') {
            let (name, ways) = file.split_once(' ').ok_or("the observer gave no checksums")?;
            let of = if name == "mappings" {
                Kind::Mapped.name()
            } else {
                name
            };
            let expected = by_name
                .get(of)
                .ok_or_else(|| format!("a file of an unknown kind: {name}"))?;
            for way in ways.split(' ') {
                let (how, sum) = way.split_once('=').ok_or("the observer gave no checksums")?;
                if sum != *expected {
                    return Err(format!("{name} through {how}: {sum} instead of {expected}"));
                }
                sums += 1;
                handles += u32::from(how != "fresh");
            }
        }
        Ok(format!(
            "{sums} checksums equal, {handles} of them through handles and mappings that were open all along"
        ))
    }

    /// What to look for: content, names, and by digests alone every key on the way to them.
    fn needles(&mut self, scratch: &Scratch) -> Result<Needles, String> {
        self.doing("having digests of every key computed from the copies");
        let mut needles = self.content_needles(WINDOWS_IN_MEMORY);
        let answer = self.run_recovery(
            scratch,
            &["before"],
            &[scratch.path("withheld").join("slot-1")],
            true,
        )?;
        let windows = answer.get("windows").and_then(serde_json::Value::as_array);
        for window in windows.into_iter().flatten() {
            let text = |name: &str| window.get(name).and_then(serde_json::Value::as_str);
            let mut sha256 = [0; 32];
            let rolling = window.get("rolling").and_then(serde_json::Value::as_u64);
            let (Some(name), Some(digits), Some(rolling)) = (text("name"), text("sha256"), rolling) else {
                continue;
            };
            if hex::decode_to_slice(digits, &mut sha256).is_ok() {
                needles.add_window(name, secret_search::Window { rolling, sha256 });
            }
        }
        Ok(needles)
    }

    pub(super) fn content_needles(&self, per_file: usize) -> Needles {
        let mut needles = Needles::default();
        for kind in Kind::ALL {
            let blocks: Vec<u64> = self.markers.blocks(kind).collect();
            for block in blocks.iter().step_by(blocks.len().div_ceil(per_file).max(1)) {
                let bytes = self.markers.block(kind, *block);
                // Off the start, too: what begins a block may be torn off.
                for at in [0, 512, 3000] {
                    if let Some(bytes) = bytes.get(at..) {
                        needles.add(&format!("content: {}", kind.name()), bytes);
                    }
                }
            }
        }
        for (what, text) in self.markers.texts() {
            needles.add(&format!("name: {what}"), text.as_bytes());
            // The random part, wherever the rest was cut.
            needles.add(
                &format!("name: {what}"),
                text.get(text.len().saturating_sub(20)..)
                    .unwrap_or_default()
                    .as_bytes(),
            );
            needles.add(
                &format!("name: {what}, in hexadecimal"),
                hex::encode(&text).as_bytes(),
            );
        }
        needles
    }

    /// The searches find what they look for while the key may be used; else they would say nothing after that.
    fn seen_before(
        &mut self,
        watch: &mut Watch,
        needles: &Needles,
        [mount, kmsd]: [u32; 2],
    ) -> Result<(), String> {
        self.doing("searching both daemons while the key may be used");
        watch.tell("stir")?;
        let claim = "before: the search of the mount's memory finds keys, content and names";
        match needles.search(mount) {
            Ok(found) => {
                let missed: Vec<_> = ["record key", "file key", "content:", "name:"]
                    .into_iter()
                    .filter(|what| !found.has(what))
                    .collect();
                let seen = if missed.is_empty() {
                    Ok(format!("found in {} bytes: {}", found.searched, found.names()))
                } else {
                    Err(format!(
                        "not found: {}; found: {}",
                        missed.join(", "),
                        found.names()
                    ))
                };
                self.check("memory-mount-before", 3, claim, seen);
            }
            Err(error) => self.not_tested(
                "memory-mount-before",
                3,
                claim,
                &format!("not permitted: {error}"),
            ),
        }
        let claim = "before: the search of kmsd's memory finds the key's material";
        match needles.search(kmsd) {
            Ok(found) if found.has("material") => {
                self.check(
                    "memory-kmsd-before",
                    3,
                    claim,
                    Ok(format!("found in {} bytes", found.searched)),
                );
            }
            Ok(_) => self.check("memory-kmsd-before", 3, claim, Err("not found".to_owned())),
            Err(error) => self.not_tested("memory-kmsd-before", 3, claim, &format!("not permitted: {error}")),
        }
        Ok(())
    }

    fn gone_after(&mut self, needles: &Needles, [mount, kmsd]: [u32; 2]) -> Result<(), String> {
        for (id, pid, claim) in [
            (
                "memory-mount-after",
                mount,
                "after: no key, content or name in the mount's memory",
            ),
            (
                "memory-kmsd-after",
                kmsd,
                "after: no key of the disabled key in kmsd's memory",
            ),
        ] {
            self.doing("searching memory while the key is disabled");
            self.search_until_gone(needles, id, pid, claim)?;
        }
        Ok(())
    }

    pub(super) fn search_until_gone(
        &mut self,
        needles: &Needles,
        id: &'static str,
        pid: u32,
        claim: &str,
    ) -> Result<(), String> {
        let mut last = Found::default();
        for search in 1..=SEARCHES_MAX {
            super::check_interrupt()?;
            match needles.search(pid) {
                Ok(found) => last = found,
                Err(error) => {
                    self.not_tested(id, 3, claim, &format!("not permitted: {error}"));
                    return Ok(());
                }
            }
            if !last.unread.is_empty() {
                let why = format!("{} mappings cannot be read", last.unread.len());
                self.not_tested(id, 3, claim, &why);
                return Ok(());
            }
            if last.places.is_empty() {
                let seen = format!(
                    "{} windows in {} bytes: nothing, at search {search}",
                    needles.len(),
                    last.searched
                );
                self.check(id, 3, claim, Ok(seen));
                return Ok(());
            }
        }
        let seen = format!(
            "after {SEARCHES_MAX} searches there is still: {} {:?}",
            last.names(),
            last.places
        );
        self.check(id, 3, claim, Err(seen));
        Ok(())
    }

    /// Looks for content and names in the volume, and shows by a file in the clear that the search would find them.
    pub(super) fn search_volume(&mut self, volume: &Path, copies: Option<&PathBuf>) -> Result<(), String> {
        self.doing("searching the volume");
        let needles = self.content_needles(WINDOWS_IN_VOLUME);
        let claim = "no content and no name in the volume";
        let failed = |error: std::io::Error| format!("the volume cannot be searched: {error}");
        let mut found = needles.search_tree(volume).map_err(failed)?;
        if let Some(copies) = copies {
            let more = needles.search_tree(copies).map_err(failed)?;
            found.searched += more.searched;
            found.places.extend(more.places);
            found.unread.extend(more.unread);
        }
        // A positive control, in memory alone: nothing in the clear is written to the host.
        let hits = Kind::ALL.iter().filter(|kind| {
            let mut hit = false;
            let first = self.markers.blocks(**kind).next().unwrap_or_default();
            needles.scan(&self.markers.block(**kind, first), |_, _| hit = true);
            hit
        });
        let seen = if hits.count() != Kind::ALL.len() {
            Err("the search does not find what it looks for".to_owned())
        } else if found.places.is_empty() && found.unread.is_empty() {
            Ok(format!(
                "{} windows in {} bytes, names of files among them: nothing; in plaintext the search finds them",
                needles.len(),
                found.searched
            ))
        } else {
            Err(format!("found {:?}; not read: {:?}", found.places, found.unread))
        };
        self.check("volume-search", 3, claim, seen);
        Ok(())
    }

    /// Swap, cores, and what no process can look at.
    pub(super) fn storage_of_memory(&mut self, pids: &[u32], whose: &str) {
        let claim = &format!("nothing of {whose} was swapped, and no core can be left");
        let reasons: Result<Vec<_>, _> = pids.iter().copied().map(exposure).collect();
        match reasons.map(|reasons| reasons.concat()) {
            Ok(none) if none.is_empty() => {
                self.check(
                    "swap-and-cores",
                    3,
                    claim,
                    Ok("VmSwap 0, core limit 0".to_owned()),
                );
            }
            Ok(reasons) => self.check("swap-and-cores", 3, claim, Err(reasons.join("; "))),
            Err(error) => self.not_tested("swap-and-cores", 3, claim, &error.to_string()),
        }
        let claim = "no swap device holds anything of it";
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        match swaps.lines().count() {
            1 => self.check("swap-devices", 3, claim, Ok("this host has no swap".to_owned())),
            _ => self.not_tested(
                "swap-devices",
                3,
                claim,
                "this host has swap, which was not searched",
            ),
        }
        self.not_tested(
            "kernel-memory",
            3,
            "no page that the kernel freed holds plaintext",
            "memory that no process has cannot be looked at from here; boot with init_on_free=1",
        );
    }

    /// What would go on reading below the mount.
    pub(super) fn bypasses(&mut self, mountpoint: &Path) {
        let claim = "no loop device and no NFS export lies over the mount";
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if Path::new(backing.trim_end()).starts_with(mountpoint) {
                found.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        let exports = std::fs::read_to_string("/proc/fs/nfsd/exports").unwrap_or_default();
        let exported = |line: &&str| {
            line.split_whitespace()
                .next()
                .is_some_and(|path| Path::new(path).starts_with(mountpoint))
        };
        found.extend(exports.lines().filter(exported).map(str::to_owned));
        let seen = if found.is_empty() {
            Ok("none".to_owned())
        } else {
            Err(found.join(", "))
        };
        self.check("bypasses", 3, claim, seen);
    }

    /// Takes the key away under the observer's eyes.
    pub(super) fn darken(
        &mut self,
        name: &'static str,
        watch: &mut Watch,
        kms: &Kms<'_>,
        key: &str,
        before: Option<(u64, &'static str)>,
    ) -> Result<Dark, String> {
        if before.is_none() {
            pause(WARM_UP)?;
            watch.tell("hot")?;
            pause(HOT)?;
        } else {
            watch.tell("hot")?;
        }
        let called_ns = boottime_ns();
        kms.disable(key)?;
        let returned_ns = boottime_ns();
        pause(HOT)?;
        watch.tell("calm")?;
        self.doing(&format!(
            "the call took {} ms; watching",
            (returned_ns - called_ns) / 1_000_000
        ));
        pause(self.request.observe)?;
        Ok(Dark {
            name,
            before,
            called_ns,
            returned_ns,
        })
    }

    /// Gives the key back, and checks that everything is as it was.
    pub(super) fn lighten(
        &mut self,
        dark: Dark,
        mut watch: Watch,
        kms: &Kms<'_>,
        key: &str,
    ) -> Result<(), String> {
        let load = watch.ease()?;
        let until_ns = boottime_ns();
        kms.enable(key)?;
        let enabled_ns = boottime_ns();
        self.readable(
            &mut watch,
            (
                "restored",
                4,
                "every byte is back, with no remount; open handles and mappings live",
            ),
        )?;
        pause(WARM_UP)?;
        let lines = watch.finish()?;
        drop(watch);
        let records: Vec<Record> = super::timeline::parse(&super::timeline::text(&lines))?;
        let is_back = |access: &Access| {
            let mut later = records
                .iter()
                .filter(|record| record.access == *access && record.begin_ns > enabled_ns);
            later.any(Record::succeeded)
        };
        let dead: Vec<_> = Access::ALL
            .iter()
            .filter(|access| !is_back(access))
            .map(|access| access.name())
            .collect();
        let seen = if dead.is_empty() {
            Ok("every kind of access succeeded again".to_owned())
        } else {
            Err(format!("still refused: {}", dead.join(", ")))
        };
        self.check("access-restored", 4, "every kind of access succeeds again", seen);
        self.judge(dark, load, lines, until_ns, Some(enabled_ns));
        Ok(())
    }

    /// Ends the observation of a mount that does not come back.
    fn close(&mut self, dark: Dark, mut watch: Watch, enabled_ns: Option<u64>) -> Result<(), String> {
        let load = watch.ease()?;
        let until_ns = boottime_ns();
        let lines = watch.finish()?;
        drop(watch);
        self.judge(dark, load, lines, until_ns, enabled_ns);
        Ok(())
    }

    fn judge(
        &mut self,
        dark: Dark,
        load: super::watch::Load,
        lines: Vec<String>,
        until_ns: u64,
        enabled_ns: Option<u64>,
    ) {
        let phase = Phase {
            name: dark.name,
            darkness: Darkness {
                called_ns: dark.called_ns,
                returned_ns: dark.returned_ns,
                until_ns,
            },
            before: dark.before,
            enabled_ns,
            load,
            lines,
        };
        let seen = phase.held().map(|verdict| {
            let tried: u64 = verdict.after.values().sum();
            let errnos: Vec<_> = verdict.errnos.iter().map(|(errno, count)| format!("{} {count} times", errno_name(*errno))).collect();
            format!(
                "DisableKey took {} ms; 0 of {tried} accesses that began after its return succeeded ({}), nor any of the loops \
                 without pauses, which had succeeded {} times before",
                (dark.returned_ns - dark.called_ns) / 1_000_000,
                errnos.join(", "),
                phase.load.successes
            )
        });
        let claim = match dark.name {
            "live" => "no access that began after DisableKey had returned succeeded",
            "stopped" => "the same while the mount's process is stopped",
            _ => "the same after the mount's process was killed",
        };
        self.check(Phase::check_id(dark.name), 2, claim, seen);
        self.findings.phases.push(phase);
    }

    /// Step 6.
    pub(super) fn hardware(&mut self) {
        self.step(6, "hardware");
        self.not_tested(
            "tpm",
            6,
            "a TPM's counter, certified before and after, moved with the destruction",
            "there is none: the keystore's root slot is a file",
        );
        self.not_tested(
            "token",
            6,
            "a hardware token attests what became of its key",
            "there is none: the keystore's root slot is a file",
        );
    }
}

fn errno_name(errno: i32) -> String {
    match errno {
        libc::EKEYREVOKED => "EKEYREVOKED".to_owned(),
        libc::ENOKEY => "ENOKEY".to_owned(),
        libc::EFAULT => "EFAULT (a mapped page)".to_owned(),
        libc::ENOTCONN => "ENOTCONN".to_owned(),
        libc::ECONNABORTED => "ECONNABORTED".to_owned(),
        other => format!("errno {other}"),
    }
}

pub(super) fn is_slot(name: &str) -> bool {
    name.starts_with("slot-")
}

fn is_lock(name: &str) -> bool {
    matches!(name, "lock" | "LOCK")
}

#[cfg(test)]
mod tests {
    use super::super::document::Overall;
    use super::super::markers::Nonce;
    use super::super::timeline::tests::{DARK, good};
    use super::super::watch::Load;
    use super::*;

    /// What a drill concludes of such a log.
    fn concluded(records: &[Record], last_success_ns: u64) -> Findings {
        let request = Request {
            subject: super::super::Subject::Scratch,
            nonce: Nonce::parse(&"5a".repeat(32)).unwrap(),
            is_challenge: true,
            large_bytes: 4096,
            observe: Duration::ZERO,
            operator: String::new(),
            witness: None,
        };
        let mut show = |_: Progress<'_>| {};
        let mut course = Course::new(&request, &mut show);
        let dark = Dark {
            name: "live",
            before: None,
            called_ns: DARK.called_ns,
            returned_ns: DARK.returned_ns,
        };
        let load = Load {
            successes: 1,
            last_success_ns,
            failures: 1,
        };
        let lines = records.iter().map(Record::line).collect();
        course.judge(dark, load, lines, DARK.until_ns, None);
        course.end()
    }

    #[test]
    fn a_log_without_a_late_success_passes() {
        let findings = concluded(&good(), 1999);
        assert_eq!(findings.overall(), Overall::Pass, "{:?}", findings.checks);
    }

    #[test]
    fn one_access_that_succeeded_late_fails_the_drill() {
        let mut records = good();
        records.push(Record {
            access: Access::MappedPrivate,
            begin_ns: 2001,
            end_ns: 2002,
            errno: 0,
        });
        assert_eq!(concluded(&records, 1999).overall(), Overall::Failed);
        assert_eq!(concluded(&good(), 2001).overall(), Overall::Failed);
        assert_eq!(concluded(&[], 1999).overall(), Overall::Failed);
    }
}
