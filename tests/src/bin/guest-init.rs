//! `/init` of the test guests. As any other process it serves the same requests on its standard input, which is how it
//! is tested, and how a guest tries to run a program from a share.

use std::io::{self, BufReader};
use std::process::ExitCode;

use tests::guest::{Agent, init, write_line};

fn main() -> ExitCode {
    let result = if rustix::process::getpid().is_init() {
        init().map_err(|failure| failure.to_string())
    } else {
        let (mut input, mut output) = (BufReader::new(io::stdin()), io::stdout());
        let served = Agent::default().serve(&mut input, |reply| write_line(&mut output, reply));
        served.map(drop).map_err(|error| error.to_string())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("guest-init: {text}");
            ExitCode::FAILURE
        }
    }
}
