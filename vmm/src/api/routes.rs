//! What can be asked for, and the answers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::http::Response;
use super::probe::Probe;
use crate::metrics;

/// How old an answer may be. Whoever asks more often gets the same again, and the VM notices nothing of it.
const FRESH: Duration = Duration::from_millis(100);

const JSON: &str = "application/json";
const OK: (u16, &str) = (200, "OK");

/// All that can be asked for.
pub(super) const PATHS: [&str; 5] = ["/v1/status", "/v1/window", "/v1/files", "/v1/report", "/metrics"];

/// Answers requests about one VM.
pub(super) struct Routes {
    probe: Probe,
    recent: HashMap<&'static str, (Instant, Response)>,
}

impl Routes {
    pub(super) fn new(probe: Probe) -> Routes {
        Routes { probe, recent: HashMap::new() }
    }

    /// The answer to a request.
    pub(super) fn answer(&mut self, method: &str, target: &str) -> Response {
        let path = target.split('?').next().unwrap_or_default();
        let Some(path) = PATHS.into_iter().find(|known| *known == path) else {
            let what = format!("there is no {path}; there are {}", PATHS.join(", "));
            return error((404, "Not Found"), &what);
        };
        if !matches!(method, "GET" | "HEAD") {
            return error((405, "Method Not Allowed"), "the API is read-only: use GET");
        }
        let now = Instant::now();
        if let Some((at, response)) = self.recent.get(path)
            && now.duration_since(*at) < FRESH
        {
            return response.clone();
        }
        let response = self.make(path);
        self.recent.insert(path, (now, response.clone()));
        response
    }

    fn make(&self, path: &str) -> Response {
        match path {
            "/v1/status" => json(&self.probe.status()),
            "/v1/window" => json(&self.probe.windows()),
            "/v1/files" => json(&self.probe.files()),
            "/v1/report" => json(&self.probe.counters()),
            _ => Response {
                status: OK,
                content_type: metrics::CONTENT_TYPE,
                body: metrics::encode(&self.probe.counters()).into_bytes(),
            },
        }
    }
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            Response { status: OK, content_type: JSON, body }
        }
        Err(wrong) => error((500, "Internal Server Error"), &wrong.to_string()),
    }
}

/// An answer that says what is wrong.
pub(super) fn error(status: (u16, &'static str), what: &str) -> Response {
    let body = format!("{}\n", json!({ "error": what })).into_bytes();
    Response { status, content_type: JSON, body }
}
