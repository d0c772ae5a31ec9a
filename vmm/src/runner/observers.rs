//! What others see of a running VM: the API socket and the metrics file.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{Plan, RunError};
use crate::api::{ApiSocket, Server};
use crate::metrics::MetricsFile;
use crate::vm::Vm;

/// What is there before the VM is, so that a path that cannot be is told before anything boots.
pub(super) struct Prepared(Option<ApiSocket>);

/// The socket and the file; dropping ends them, and writes the file for the last time.
pub(super) struct Observers {
    _api: Option<Server>,
    _metrics: Option<MetricsFile>,
}

impl Observers {
    /// Makes the socket. Clients can connect from now on, and are answered when the VM runs.
    pub fn prepare(plan: &Plan) -> Result<Prepared, RunError> {
        Ok(Prepared(plan.api_socket.as_deref().map(ApiSocket::bind).transpose()?))
    }
}

impl Prepared {
    /// Starts to answer and to write.
    pub fn start(self, plan: &Plan, vm: &Vm) -> Result<Observers, RunError> {
        let Prepared(socket) = self;
        let start = |socket| Server::start(socket, vm.probe());
        let no_thread = |error: io::Error| RunError::System("start a thread", error);
        let api = socket.map(start).transpose().map_err(no_thread)?;
        let write = |(path, interval): &(PathBuf, Duration)| MetricsFile::start(path, *interval, vm.probe());
        let metrics = plan.metrics.as_ref().map(write).transpose()?;
        Ok(Observers { _api: api, _metrics: metrics })
    }
}
