//! `ledger-service PATH [PORT]`: serves the ledger at PATH on TCP port PORT (7000) of every address.

use ledger_service::{ledger::Ledger, service};
use std::net::TcpListener;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ledger-service: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, port) = match arguments.as_slice() {
        [path] => (path, 7000),
        [path, port] => (path, port.parse()?),
        _ => return Err("usage: ledger-service PATH [PORT]".into()),
    };
    let ledger = Ledger::open(Path::new(path))?;
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("ledger-service: {} lines in {path}, port {port}", ledger.total());
    service::serve(&listener, ledger);
    Ok(())
}
