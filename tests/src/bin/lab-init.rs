//! What runs in the lab's emulated host: PID 1, and with the argument `agent` the agent on one port.

use tests::lab::{agent, cli, init};

fn main() {
    if std::process::id() == 1 {
        cli::report(&init::run());
        init::power_off();
    }
    if let Err(error) = agent::serve() {
        cli::report(&error);
    }
}
