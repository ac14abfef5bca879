//! The work of revocation.sh: std only, built by plain rustc.
//!
//! `revocation fill` makes the files that are read; `revocation herd` starts the processes that read and write them, and obeys
//! lines of its standard input: `cycles N`, `revoke`, `restore`. It prints one line that begins with `done` or `failed` for
//! each. `revocation verify` compares what writers wrote with their journals. What is where comes in the environment.
//!
//! The processes of the herd hold files open and mapped; the herd itself holds none, since whatever it starts would close
//! copies of them, and wait for a mount that may be stopped. Each access is stamped before it begins and when it has ended, in a
//! ring that the herd reads. Mapped pages are touched by read(2) and write(2), which fail with EFAULT where a load or a store
//! would be answered by SIGBUS.
mod c;
mod herd;
mod log;
mod readers;
mod system;
mod world;
mod writers;

use herd::Herd;
use log::Log;
use readers::{look_for_ever, read_for_ever};
use std::io::{Error, Result};
use std::{env, process};
use world::{READERS, Role, WRITERS, World};
use writers::{verify, write_for_ever};

fn run() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let world = World::from_env()?;
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["fill"] => world.fill(),
        ["warm"] => world.warm(),
        ["verify", when @ ("unmounted" | "crashed")] => {
            for role in WRITERS {
                let found = verify(&world, role, *when == "crashed")?;
                if found.lost_synced + found.lost_accepted + found.wrong > 0 {
                    return Err(Error::other(format!("{role:?} writer: {found:?}")));
                }
            }
            Ok(())
        }
        ["member", number] => {
            // SAFETY: takes two numbers.
            unsafe { c::prctl(c::PR_SET_PDEATHSIG, c::SIGKILL) };
            let number: usize = number.parse().map_err(Error::other)?;
            let log = Log::of(&world, number)?;
            match READERS.get(number) {
                Some(Role::Names) => look_for_ever(&world, log),
                Some(role) => read_for_ever(&world, *role, log),
                None => write_for_ever(
                    &world,
                    WRITERS[number - READERS.len()],
                    number - READERS.len(),
                    log,
                ),
            }
        }
        ["herd", members @ ("readers" | "all")] => {
            let mut herd = Herd::start(&world, *members == "all")?;
            println!("done ready");
            for line in std::io::stdin().lines() {
                let line = line?;
                if line == "end" {
                    break;
                }
                match herd.obey(&line) {
                    Ok(said) => println!("done {said}"),
                    Err(error) => println!("failed {error}"),
                }
            }
            Ok(())
        }
        _ => Err(Error::other(
            "usage: revocation fill|warm|verify unmounted|verify crashed|herd readers|herd all",
        )),
    }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("revocation: {error}");
        process::exit(1);
    }
}
