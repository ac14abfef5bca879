//! `kmsd`: the key management service.

use clap::{Parser, Subcommand};
use kms_daemon::{Engine, Placement, ServeOptions, SystemClock, harden, serve};
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
    },
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
    let outcome: Result<(), Box<dyn std::error::Error>> = match arguments.command {
        Command::Init {
            home,
            region,
            account,
        } => Engine::init(&home, &Placement { region, account }, &SystemClock).map_err(Into::into),
        Command::Serve {
            home,
            socket,
            socket_mode,
        } => {
            let socket = kms_api::socket_path(socket.as_deref());
            serve(&ServeOptions {
                home,
                socket,
                socket_mode,
            })
            .map_err(Into::into)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// One line on the standard error output, if that is still there.
fn complain(message: &str) {
    let _heard = writeln!(std::io::stderr(), "kmsd: {message}");
}
