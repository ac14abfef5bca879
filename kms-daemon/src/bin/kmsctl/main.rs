//! `kmsctl`: every operation of the KMS API, from a shell.

mod arguments;
mod audit;
mod dependants;
mod json;
mod operations;

use arguments::{Arguments, AuditCommand, Operation};
use clap::Parser;
use kms_client::Client;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(answer) => {
            // A reader that hangs up has seen what it wanted.
            let _ = writeln!(std::io::stdout().lock(), "{answer:#}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            let _ = writeln!(std::io::stderr().lock(), "{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<serde_json::Value, String> {
    let connect = || {
        let socket = kms_client::socket_path(arguments.socket.as_deref());
        let timeout = Duration::from_secs(arguments.timeout_seconds.into());
        Client::connect(&socket, timeout).map_err(|error| operations::describe(&error))
    };
    match arguments.operation {
        Operation::Key(operation) => operations::key(&connect()?, operation),
        Operation::Alias(operation) => operations::alias(&connect()?, operation),
        Operation::Cryptography(operation) => operations::cryptography(&connect()?, operation),
        Operation::Batch(operation) => operations::batch(&connect()?, &operation),
        Operation::Keystore(operation) => operations::keystore(&connect()?, operation),
        Operation::Audit {
            command: AuditCommand::Verify { home, file, head },
        } => audit::verify(home.as_deref(), file.as_deref(), head.as_deref()),
    }
}
