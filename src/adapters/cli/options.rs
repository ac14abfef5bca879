//! The options of `cmkfs mount -o`.

use super::Failure;
use crate::adapters::fuse::{CacheMode, MountFlags};
use crate::engine::{Options, Verify};
use std::str::FromStr;
use std::time::Duration;

/// What the options come to.
#[derive(Debug, Clone, Copy)]
pub(super) struct MountOptions {
    pub(super) engine: Options,
    pub(super) flags: MountFlags,
    pub(super) cache: CacheMode,
}

/// Reads the options, the last one winning; `is_root` sets the defaults that mount(8) has for root.
pub(super) fn parse(arguments: &[String], is_root: bool) -> Result<MountOptions, Failure> {
    let mut options = MountOptions {
        engine: Options::default(),
        flags: MountFlags {
            read_only: false,
            no_suid: !is_root,
            no_dev: !is_root,
            no_exec: false,
            allow_other: is_root,
        },
        cache: CacheMode::default(),
    };
    for option in arguments
        .iter()
        .flat_map(|argument| argument.split(','))
        .filter(|option| !option.is_empty())
    {
        match option.split_once('=') {
            None => set_flag(&mut options, option)?,
            Some((name, value)) => set_value(&mut options, name, value)?,
        }
    }
    options.engine.read_only = options.flags.read_only;
    Ok(options)
}

fn set_flag(options: &mut MountOptions, name: &str) -> Result<(), Failure> {
    let flags = &mut options.flags;
    match name {
        "ro" => flags.read_only = true,
        "rw" => flags.read_only = false,
        "nosuid" => flags.no_suid = true,
        "suid" => flags.no_suid = false,
        "nodev" => flags.no_dev = true,
        "dev" => flags.no_dev = false,
        "noexec" => flags.no_exec = true,
        "exec" => flags.no_exec = false,
        "allow_other" => flags.allow_other = true,
        "noallow_other" => flags.allow_other = false,
        "accept_kms_restore" => options.engine.accept_kms_restore = true,
        // How it always is, and what mount(8) adds for an fstab entry.
        "noatime" | "defaults" => {}
        _ => {
            return Err(format!(
                "unknown mount option '{name}'; 'cmkfs mount --help' lists those there are"
            ));
        }
    }
    Ok(())
}

fn set_value(options: &mut MountOptions, name: &str, value: &str) -> Result<(), Failure> {
    let engine = &mut options.engine;
    match name {
        "cache" => {
            options.cache = match value {
                "writeback" => CacheMode::Writeback,
                "none" => CacheMode::None,
                _ => return Err(format!("cache={value}: it is cache=writeback or cache=none")),
            }
        }
        "verify" => {
            engine.verify = match value {
                "lazy" => Verify::Lazy,
                "full" => Verify::Full,
                "off" => Verify::Off,
                _ => {
                    return Err(format!(
                        "verify={value}: it is verify=lazy, verify=full or verify=off"
                    ));
                }
            }
        }
        "publish_interval_ms" => {
            engine.publish_interval = Duration::from_millis(number(name, value, 10, 3_600_000)?)
        }
        "key_poll_interval_ms" => {
            engine.key_poll_interval = Duration::from_millis(number(name, value, 10, 60_000)?)
        }
        "drain_max_ms" => engine.drain_max = Duration::from_millis(number(name, value, 0, 28_000)?),
        "block_cache_mib" => engine.block_cache_bytes = number::<usize>(name, value, 8, 1 << 20)? << 20,
        "dek_cache_entries_max" => engine.dek_cache_entries_max = number(name, value, 256, 1 << 24)?,
        "node_cache_entries_max" => engine.node_cache_entries_max = number(name, value, 256, 1 << 24)?,
        _ => {
            return Err(format!(
                "unknown mount option '{name}'; 'cmkfs mount --help' lists those there are"
            ));
        }
    }
    Ok(())
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    name: &str,
    value: &str,
    least: T,
    most: T,
) -> Result<T, Failure> {
    match value.parse::<T>() {
        Ok(number) if number >= least && number <= most => Ok(number),
        _ => Err(format!(
            "{name}={value}: it takes a number from {least} to {most}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &str) -> Result<MountOptions, Failure> {
        parse(&[options.to_owned()], true)
    }

    #[test]
    fn options_are_read_and_the_last_one_wins() {
        let options = parsed("ro,nosuid,rw,ro,cache=none,publish_interval_ms=250").unwrap();
        assert!(options.engine.read_only && options.flags.read_only && options.flags.no_suid);
        assert_eq!(options.cache, CacheMode::None);
        assert_eq!(options.engine.publish_interval, Duration::from_millis(250));
        assert_eq!(options.engine.verify, Verify::Lazy);
        assert_eq!(parsed("verify=full").unwrap().engine.verify, Verify::Full);
        assert_eq!(
            parsed("verify=full,verify=off").unwrap().engine.verify,
            Verify::Off
        );
    }

    #[test]
    fn what_is_unknown_or_out_of_range_is_named() {
        for (options, named) in [
            ("bogus", "'bogus'"),
            ("size=3", "'size'"),
            ("cache=all", "cache=all"),
            ("verify=never", "verify=never"),
            ("publish_interval_ms=0", "publish_interval_ms=0"),
            ("block_cache_mib=-1", "block_cache_mib=-1"),
        ] {
            let said = parsed(options).map(|_| ()).unwrap_err();
            assert!(said.contains(named), "{said}");
        }
    }

    #[test]
    fn ordinary_users_get_what_mount_gives_them() {
        let options = parse(&[], false).unwrap();
        assert!(options.flags.no_suid && options.flags.no_dev && !options.flags.allow_other);
    }
}
