//! `kmsd`: the key management service.

mod passphrase;

use clap::{Parser, Subcommand, ValueEnum};
use kms_daemon::{
    Engine, Keeper, NewKeystore, Placement, ServeOptions, SlotKind, SystemClock, harden, serve,
};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Plaintext is in freed memory no longer than until it is freed.
#[global_allocator]
static ALLOCATOR: kms_crypto::WipingAllocator = kms_crypto::WipingAllocator;

/// The key management service of cmkfs. Clients use kmsctl, or the gRPC API on the Unix socket.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a keystore in a new or empty directory
    Init {
        /// The keystore's directory
        #[arg(long, value_name = "DIR")]
        home: PathBuf,
        /// The region in every key's ARN; a blob of another region does not decrypt here
        #[arg(long, default_value = "local")]
        region: String,
        /// The account in every key's ARN
        #[arg(long, default_value = "0")]
        account: String,
        /// What opens the root key. Destroying either is worth nothing as an erasure of media
        #[arg(long, value_enum, default_value_t = Slot::File)]
        slot: Slot,
        /// Where the passphrase of --slot passphrase is read: a file, or /dev/fd/N [default: the terminal]
        #[arg(long, value_name = "PATH")]
        passphrase_file: Option<PathBuf>,
        /// For drills: let 'kmsctl advance-clock' shift the clock. The keystore says so for ever
        #[arg(long)]
        drill: bool,
    },
    /// Serve a keystore until SIGTERM or SIGINT; prints 'ready socket=PATH' when the socket accepts
    Serve {
        /// The keystore's directory
        #[arg(long, value_name = "DIR")]
        home: PathBuf,
        /// Where to listen [default: $KMS_SOCKET, else $XDG_RUNTIME_DIR/kmsd/kmsd.sock, else /run/kmsd/kmsd.sock]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// The socket's permission bits, in octal
        #[arg(long, value_name = "MODE", default_value = "0600", value_parser = octal_mode)]
        socket_mode: u32,
        /// Where the passphrase of a passphrase slot is read: a file, or /dev/fd/N [default: the terminal]
        #[arg(long, value_name = "PATH")]
        passphrase_file: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Slot {
    /// A file beside the database
    File,
    /// A file and a passphrase, through Argon2id
    Passphrase,
}

fn octal_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("must be octal permission bits, such as 0660".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Lines are written by a thread of their own, and lost when it falls far behind or cannot write them: neither a reader
    // that stands still nor a full disk holds up a call, or ends the thread that logs.
    let (writer, _flush) = tracing_appender::non_blocking(std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .init();
    if let Err(error) = harden() {
        complain(&format!("the process cannot be protected: {error}"));
        return ExitCode::FAILURE;
    }
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn std::error::Error>> {
    match command {
        Command::Init {
            home,
            region,
            account,
            slot,
            passphrase_file,
            drill,
        } => {
            let keeper = match (slot, passphrase_file) {
                (Slot::File, None) => Keeper::File,
                (Slot::File, Some(_)) => return Err("--passphrase-file goes with --slot passphrase".into()),
                (Slot::Passphrase, file) => Keeper::Passphrase(passphrase::new(file.as_deref())?),
            };
            let new = NewKeystore {
                placement: Placement { region, account },
                keeper,
                is_drill: drill,
            };
            Ok(Engine::init_with(&home, &new, &SystemClock)?)
        }
        Command::Serve {
            home,
            socket,
            socket_mode,
            passphrase_file,
        } => {
            let kind = Engine::slot_kind(&home)?;
            let keeper = match (kind, passphrase_file) {
                (SlotKind::Passphrase, file) => Keeper::Passphrase(passphrase::known(file.as_deref())?),
                (_, Some(_)) => return Err("this keystore's root slot takes no passphrase".into()),
                (_, None) => Keeper::File,
            };
            let socket = kms_api::socket_path(socket.as_deref());
            Ok(serve(ServeOptions {
                home,
                keeper,
                socket,
                socket_mode,
            })?)
        }
    }
}

/// One line on the standard error output, if that is still there.
fn complain(message: &str) {
    let _heard = writeln!(std::io::stderr(), "kmsd: {message}");
}
