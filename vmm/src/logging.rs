//! What daxvm says on standard error while it runs, and how often a guest can make it say so.
//!
//! Much of what is logged a guest can cause as often as it likes, and standard error is often a file. So each place in the
//! code may say [`BURST`] things at once and one more each [`INTERVAL`], whatever they are about. What was left out is
//! counted; the next line from there tells the number, or else the end of the program does. Messages below level `info`
//! are for who has asked for them (`RUST_LOG`), and all of them come.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Messages that a place may have at once.
const BURST: u32 = 10;

/// How long it takes until there may be one more.
const INTERVAL: Duration = Duration::from_secs(60);

/// The places of this process.
static SITES: OnceLock<Sites> = OnceLock::new();

/// Has what is logged written to standard error.
pub(crate) fn init() {
    // fuse-backend-rs logs errors that a guest can cause at will; the device reports what matters of them.
    let default = || EnvFilter::new("warn,fuse_backend_rs=off");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| default());
    let sites = SITES.get_or_init(Sites::default);
    // The first subscriber of the process; a second one is only possible where the library is embedded.
    let _ = subscriber(filter, sites, std::io::stderr).try_init();
}

/// Says what was left out and not said yet.
pub(crate) fn end() {
    for (place, left_out) in SITES.get().map(Sites::take_left_out).unwrap_or_default() {
        eprintln!("daxvm: {left_out} more messages of {place} were left out, as they came too fast");
    }
}

fn subscriber(
    filter: EnvFilter,
    sites: &'static Sites,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> impl Subscriber + Send + Sync + 'static {
    let format = Limited { format: Format::default(), sites };
    tracing_subscriber::fmt().with_env_filter(filter).event_format(format).with_writer(writer).finish()
}

/// Writes events as `F` does, unless there were too many from the same place. What comes by the `log` crate has one place
/// a level.
struct Limited<F> {
    format: F,
    sites: &'static Sites,
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if *event.metadata().level() > Level::INFO {
            return self.format.format_event(context, writer, event);
        }
        // An event without a text is one that is not written.
        let Some(left_out) = self.sites.admit(event.metadata(), Instant::now()) else { return Ok(()) };
        self.format.format_event(context, writer.by_ref(), event)?;
        match left_out {
            0 => Ok(()),
            _ => writeln!(writer, "  (before it, {left_out} more messages of this place were left out)"),
        }
    }
}

/// The places from which something was logged. There are as many as the program has.
#[derive(Default)]
struct Sites(Mutex<HashMap<Identifier, Site>>);

struct Site {
    metadata: &'static Metadata<'static>,
    /// Messages that it may have now.
    left: u32,
    /// Since when it might have one more.
    since: Instant,
    left_out: u64,
}

impl Sites {
    /// Whether a place may have a message now; if so, how many were left out since the last one.
    fn admit(&self, metadata: &'static Metadata<'static>, now: Instant) -> Option<u64> {
        let mut sites = self.lock();
        let new = || Site { metadata, left: BURST, since: now, left_out: 0 };
        let site = sites.entry(metadata.callsite()).or_insert_with(new);
        while site.left < BURST && now.saturating_duration_since(site.since) >= INTERVAL {
            site.left += 1;
            site.since += INTERVAL;
        }
        if site.left == 0 {
            site.left_out += 1;
            return None;
        }
        if site.left == BURST {
            site.since = now;
        }
        site.left -= 1;
        Some(std::mem::take(&mut site.left_out))
    }

    /// The places whose last messages were left out, by name, and how many.
    fn take_left_out(&self) -> Vec<(String, u64)> {
        let mut sites = self.lock();
        let silent = sites.values_mut().filter(|site| site.left_out > 0);
        let place = |metadata: &Metadata<'_>| match metadata.line() {
            Some(line) => format!("{} (line {line})", metadata.target()),
            None => metadata.target().to_owned(),
        };
        let mut all: Vec<_> =
            silent.map(|site| (place(site.metadata), std::mem::take(&mut site.left_out))).collect();
        all.sort();
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identifier, Site>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use devices::pci::{MsiMessage, MsiRouter, PciDevice};
    use devices::virtio::device::DeviceMemory;
    use devices::virtio::pci::VirtioPciDevice;
    use devices::virtio::rng::RngDevice;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written while `work` runs, and the places.
    fn logged(filter: &str, work: impl FnOnce()) -> (String, &'static Sites) {
        let sites: &'static Sites = Box::leak(Box::default());
        let written = Written::default();
        let maker = written.clone();
        let subscriber = subscriber(EnvFilter::new(filter), sites, move || maker.clone());
        tracing::subscriber::with_default(subscriber, work);
        let bytes = written.0.lock().unwrap().clone();
        (String::from_utf8(bytes).unwrap(), sites)
    }

    /// An interrupt controller that takes nothing.
    struct NoRoutes;

    impl MsiRouter for NoRoutes {
        fn route(&self, _: u16, _: MsiMessage) -> io::Result<()> {
            Err(io::ErrorKind::InvalidInput.into())
        }

        fn deliver(&self, _: u16) -> io::Result<()> {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    #[test]
    fn a_guest_that_breaks_the_rules_a_million_times_gets_few_lines() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut next = 0xc000_0000;
        let place = |size: u64, _| {
            next += size;
            Some(next - size)
        };
        let device = Box::<RngDevice>::default();
        let mut function =
            VirtioPciDevice::new(device, DeviceMemory::new(memory), |_| Ok(Arc::new(NoRoutes)), place)
                .unwrap();
        let bar = function.bars()[0].index;
        const STATUS: u64 = 20;
        let (text, sites) = logged("warn", || {
            function.write_bar(bar, STATUS, &[1]);
            for _ in 0..500_000 {
                // A step that is skipped, and a bit that is cleared.
                function.write_bar(bar, STATUS, &[1 | 8]);
                function.write_bar(bar, STATUS, &[2]);
            }
        });
        // Each minute that the test takes is one line more for each of both.
        assert!((20..100).contains(&text.lines().count()), "{text}");
        let said = text.lines().filter(|line| line.contains("ignored")).count() as u64;
        let number = |line: &str| line.split_once("before it, ")?.1.split(' ').next()?.parse::<u64>().ok();
        let said_later: u64 = text.lines().filter_map(number).sum();
        let never_said: u64 = sites.take_left_out().iter().map(|(_, number)| number).sum();
        assert_eq!(said + said_later + never_said, 1_000_000, "each is counted once\n{text}");
    }

    #[test]
    fn each_place_has_its_own_limit_and_debugging_has_none() {
        let (text, sites) = logged("debug", || {
            for number in 0..30 {
                tracing::warn!(number, "one");
                tracing::error!(number, "other");
                tracing::debug!(number, "asked for");
            }
        });
        let count = |what| text.lines().filter(|line| line.contains(what)).count();
        assert_eq!((count("one"), count("other"), count("asked for")), (10, 10, 30), "{text}");
        let left_out = sites.take_left_out();
        assert!(matches!(&left_out[..], [(one, 20), (other, 20)] if one != other && one.contains("logging")));
        assert_eq!(sites.take_left_out(), []);
    }

    #[test]
    fn time_makes_room_for_one_message_after_the_other() {
        let (_, sites) = logged("warn", || tracing::warn!("a place"));
        let metadata = sites.lock().values().next().unwrap().metadata;
        let start = sites.lock().values().next().unwrap().since;
        let admit = |seconds| sites.admit(metadata, start + Duration::from_secs(seconds));
        for _ in 1..BURST {
            assert_eq!(admit(1), Some(0));
        }
        assert_eq!((admit(1), admit(59)), (None, None));
        assert_eq!((admit(60), admit(60)), (Some(2), None));
        assert_eq!((admit(200), admit(200), admit(200)), (Some(1), Some(0), None));
        // A long silence is worth no more than a new place has.
        let admitted = (0..100).filter(|_| admit(100_000).is_some()).count();
        assert_eq!(admitted, BURST as usize);
    }
}
