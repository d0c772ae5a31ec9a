//! Values as people write them, on the command line and in files: what parses them knows their limits.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use devices::text::{Bytes, parse_duration, parse_size};
use devices::virtio::fs::check_tag;
use devices::virtio::fs::window::check_window_size;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::{MAX_MEMORY, MIN_MEMORY};
use crate::arch::x86_64::MAX_VCPUS;
use crate::layout::HUGE_PAGE;

/// Parses a number of vCPUs.
///
/// # Errors
/// The limits.
pub fn parse_cpus(text: &str) -> Result<u8, String> {
    let limits = || format!("a guest has 1 to {MAX_VCPUS} vCPUs");
    check_cpus(text.parse().map_err(|_| limits())?)
}

fn check_cpus(cpus: u64) -> Result<u8, String> {
    match u8::try_from(cpus) {
        Ok(cpus) if (1..=MAX_VCPUS).contains(&cpus) => Ok(cpus),
        _ => Err(format!("a guest has 1 to {MAX_VCPUS} vCPUs")),
    }
}

/// Parses a size of a guest's RAM.
///
/// # Errors
/// The limits, and the nearest size.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    check_memory(parse_size(text)?)
}

pub(super) fn check_memory(bytes: u64) -> Result<u64, String> {
    if bytes.is_multiple_of(HUGE_PAGE) && (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        return Ok(bytes);
    }
    let nearest = bytes.clamp(MIN_MEMORY, MAX_MEMORY).next_multiple_of(HUGE_PAGE);
    let most = Bytes(MAX_MEMORY);
    let nearest = nearest >> 20;
    let meant =
        if (2..1 << 20).contains(&bytes) { format!("; did you mean {bytes}M?") } else { String::new() };
    Err(format!(
        "a guest has 64 MiB to {most} of memory, in steps of 2 MiB; the nearest is {nearest}M{meant}"
    ))
}

/// Parses the size of a DAX window.
///
/// # Errors
/// The limits, and the nearest sizes.
pub fn parse_window(text: &str) -> Result<u64, String> {
    check_window(parse_size(text)?)
}

fn check_window(bytes: u64) -> Result<u64, String> {
    check_window_size(bytes).map_err(|error| error.to_string())
}

/// Parses the tag of a share.
///
/// # Errors
/// The limits.
pub fn parse_tag(text: &str) -> Result<String, String> {
    check_tag(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// Parses how long something may take.
///
/// # Errors
/// What to write.
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    check_limit(parse_duration(text)?)
}

/// The shortest interval at which files are written or a VM is asked.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Parses an interval: 100 ms or more.
///
/// # Errors
/// What to write.
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    check_interval(parse_duration(text)?)
}

fn check_interval(interval: Duration) -> Result<Duration, String> {
    match interval < MIN_INTERVAL {
        true => Err("an interval is 100ms or longer".into()),
        false => Ok(interval),
    }
}

fn check_limit(limit: Duration) -> Result<Duration, String> {
    match limit.is_zero() {
        true => Err("in no time nothing can run; leave it out for no limit".into()),
        false => Ok(limit),
    }
}

/// Parses `NAME=VALUE` or `NAME`.
///
/// # Errors
/// What to write.
pub fn parse_variable(text: &str) -> Result<(String, Option<String>), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    check_variable(name, value.as_deref().unwrap_or_default())?;
    Ok((name.to_owned(), value))
}

fn check_variable(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(format!("{name:?} is no name of an environment variable: write NAME=VALUE or NAME"));
    }
    match value.contains('\0') {
        true => Err(format!("the value of `{name}` has a NUL, which no environment can hold")),
        false => Ok(()),
    }
}

/// What is a whole number, or text that people write instead.
struct NumberOrText<T> {
    expected: &'static str,
    number: fn(u64) -> Result<T, String>,
    text: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for NumberOrText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.number)(number).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        let wrong = || E::invalid_value(de::Unexpected::Signed(number), &self);
        (self.number)(u64::try_from(number).map_err(|_| wrong())?).map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.text)(text).map_err(E::custom)
    }
}

/// Implements (de)serialisation of an `Option` for `#[serde(with)]`, whose value is never none in a file: where there is
/// nothing, the field is missing.
macro_rules! human {
    ($(#[$doc:meta])* $name:ident: $type:ty, $expected:literal, $number:expr, $text:expr, $print:expr) => {
        $(#[$doc])*
        pub(super) mod $name {
            use super::*;
            use serde::Serializer;

            pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<$type>, D::Error> {
                let visitor = NumberOrText { expected: $expected, number: $number, text: $text };
                deserializer.deserialize_any(visitor).map(Some)
            }

            pub fn serialize<S: Serializer>(value: &Option<$type>, serializer: S) -> Result<S::Ok, S::Error> {
                match value {
                    Some(value) => $print(*value, serializer),
                    None => serializer.serialize_none(),
                }
            }
        }
    };
}

human!(
    /// A number of vCPUs.
    cpus: u8, "a number from 1 to 32", check_cpus, parse_cpus,
    |value, serializer: S| serializer.serialize_u8(value)
);
human!(
    /// A size of RAM: `"512M"`, or bytes.
    memory: u64, "a size: \"512M\", or a number of bytes", check_memory, parse_memory,
    |value, serializer: S| serializer.serialize_str(&devices::text::exact_size(value))
);
human!(
    /// A size of a window: `"256M"`, or bytes.
    window: u64, "a size: \"256M\", or a number of bytes", check_window, parse_window,
    |value, serializer: S| serializer.serialize_str(&devices::text::exact_size(value))
);
human!(
    /// An interval: `"5s"`, or seconds.
    interval: Duration, "a time: \"500ms\", \"5s\", or a number of seconds",
    |seconds| check_interval(Duration::from_secs(seconds)), parse_interval,
    |value, serializer: S| serializer.serialize_str(&devices::text::exact_duration(value))
);

human!(
    /// A limit of time: `"90s"`, or seconds.
    limit: Duration, "a time: \"90s\", \"5m\", or a number of seconds",
    |seconds| check_limit(Duration::from_secs(seconds)), parse_limit,
    |value, serializer: S| serializer.serialize_str(&devices::text::exact_duration(value))
);

/// The tag of a share.
pub(super) fn tag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let tag: String = de::Deserialize::deserialize(deserializer)?;
    parse_tag(&tag).map_err(de::Error::custom)
}

/// Environment variables as a table: the value is a string, or `true` for the caller's value.
pub(super) mod environment {
    use serde::Serializer;
    use serde::ser::SerializeMap;

    use super::*;

    type Variables = Vec<(String, Option<String>)>;

    /// A variable's value.
    #[derive(schemars::JsonSchema, serde::Deserialize)]
    #[serde(untagged, expecting = "a string, or true for the value that daxvm has itself")]
    pub enum Value {
        /// This value.
        Set(String),
        /// `true`: the value that daxvm has itself.
        Inherit(
            #[serde(deserialize_with = "only_true")]
            #[schemars(schema_with = "true_schema")]
            (),
        ),
    }

    fn true_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "const": true })
    }

    fn only_true<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
        let value: bool = de::Deserialize::deserialize(deserializer)?;
        value.then_some(()).ok_or_else(|| de::Error::custom("false says nothing"))
    }

    struct Table;

    impl<'de> Visitor<'de> for Table {
        type Value = Variables;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of variables, as in { RUST_LOG = \"debug\", HOME = true }")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Variables, A::Error> {
            let mut variables = Vec::new();
            while let Some(name) = map.next_key::<String>()? {
                let value = match map.next_value()? {
                    Value::Set(value) => Some(value),
                    Value::Inherit(()) => None,
                };
                check_variable(&name, value.as_deref().unwrap_or_default()).map_err(de::Error::custom)?;
                variables.push((name, value));
            }
            Ok(variables)
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Variables, D::Error> {
        deserializer.deserialize_map(Table)
    }

    pub fn serialize<S: Serializer>(variables: &Variables, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(variables.len()))?;
        for (name, value) in variables {
            match value {
                Some(value) => map.serialize_entry(name, value)?,
                None => map.serialize_entry(name, &true)?,
            }
        }
        map.end()
    }
}

/// A command as an array of strings.
pub(super) mod command {
    use serde::Serializer;
    use serde::de::SeqAccess;
    use serde::ser::{Error, SerializeSeq};

    use super::*;

    struct Words;

    impl<'de> Visitor<'de> for Words {
        type Value = Vec<OsString>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of a program and its arguments, as in [\"sh\", \"-c\", \"make test\"]")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut words: A) -> Result<Vec<OsString>, A::Error> {
            let mut command = Vec::new();
            while let Some(word) = words.next_element::<String>()? {
                if word.contains('\0') {
                    return Err(de::Error::custom("an argument has a NUL, which no program can be given"));
                }
                command.push(word.into());
            }
            Ok(command)
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<OsString>, D::Error> {
        deserializer.deserialize_seq(Words)
    }

    pub fn serialize<S: Serializer>(command: &Vec<OsString>, serializer: S) -> Result<S::Ok, S::Error> {
        let mut words = serializer.serialize_seq(Some(command.len()))?;
        for word in command {
            let no_text =
                || S::Error::custom(format!("the argument {word:?} is not UTF-8, which a file must be"));
            words.serialize_element(word.to_str().ok_or_else(no_text)?)?;
        }
        words.end()
    }
}

/// The schema of a size.
pub(super) fn size_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [
        { "type": "integer", "minimum": 0 },
        { "type": "string", "pattern": "^[0-9]+([kKmMgGtT]([iI]?[bB])?|[bB])?$" },
    ] })
}

/// The schema of a time.
pub(super) fn limit_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [
        { "type": "integer", "minimum": 1 },
        { "type": "string", "pattern": "^[0-9]+([.][0-9]+)?(ms|s|m|min|h|d)?$" },
    ] })
}

/// The schema of a number of vCPUs.
pub(super) fn cpus_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "minimum": 1, "maximum": MAX_VCPUS })
}

/// The schema of a tag.
pub(super) fn tag_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "minLength": 1, "maxLength": 36 })
}

/// The schema of a cache mode.
pub(super) fn cache_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": ["never", "none", "auto", "metadata", "always"] })
}

/// The schema of a way to prefault.
pub(super) fn prefault_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": ["never", "cached", "all"] })
}

/// Splits `FIRST,SECOND,...`. A comma that belongs to a value is written twice, as for QEMU.
pub fn split_options(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ',' if rest.next_if_eq(&',').is_none() => parts.push(String::new()),
            _ => parts.last_mut().expect("there is always one").push(c),
        }
    }
    parts
}

/// What a path stands for that is relative to `base`.
pub(super) fn absolute(path: &mut PathBuf, base: &std::path::Path) {
    if path.is_relative() && !path.as_os_str().is_empty() {
        // Of the current directory only the slashes and dots are of interest: `base` is absolute.
        let joined = base.join(&*path);
        *path = std::path::absolute(&joined).unwrap_or(joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named_with_the_nearest_value() {
        for (text, says) in [
            (parse_cpus("0").unwrap_err(), "1 to 32 vCPUs"),
            (parse_cpus("33").unwrap_err(), "1 to 32 vCPUs"),
            (parse_cpus("300").unwrap_err(), "1 to 32 vCPUs"),
            (parse_cpus("all").unwrap_err(), "1 to 32 vCPUs"),
            (parse_memory("1M").unwrap_err(), "the nearest is 64M"),
            (parse_memory("513M").unwrap_err(), "steps of 2 MiB; the nearest is 514M"),
            (parse_memory("1T").unwrap_err(), "64 MiB to 512 GiB of memory"),
            (parse_memory("lots").unwrap_err(), "for example 512M"),
            (parse_window("16M").unwrap_err(), "use 32M or more, or 0 for none"),
            (parse_window("33M").unwrap_err(), "use 32M or 34M"),
            (parse_window("1T").unwrap_err(), "use 256G or less"),
            (parse_tag("").unwrap_err(), "1 to 36 bytes"),
            (parse_tag(&"t".repeat(37)).unwrap_err(), "1 to 36 bytes"),
            (parse_limit("0s").unwrap_err(), "leave it out for no limit"),
            (parse_limit("soon").unwrap_err(), "for example 90s"),
            (parse_variable("=x").unwrap_err(), "write NAME=VALUE or NAME"),
        ] {
            assert!(text.contains(says), "{text}");
        }
        assert_eq!((parse_cpus("32"), parse_memory("512M")), (Ok(32), Ok(512 << 20)));
        assert_eq!((parse_window("0"), parse_window("32M")), (Ok(0), Ok(32 << 20)));
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), Some("b=c".into()))));
        assert_eq!(parse_variable("A="), Ok(("A".into(), Some(String::new()))));
        assert_eq!(parse_variable("A"), Ok(("A".into(), None)));
    }

    #[test]
    fn a_comma_in_a_value_is_written_twice() {
        for (text, parts) in [
            ("", vec![""]),
            ("/a", vec!["/a"]),
            ("/a,ro", vec!["/a", "ro"]),
            ("/a,,b,ro", vec!["/a,b", "ro"]),
            ("/a,,,ro", vec!["/a,", "ro"]),
            ("a,", vec!["a", ""]),
        ] {
            assert_eq!(split_options(text), parts, "{text}");
        }
    }

    #[test]
    fn relative_paths_are_relative_to_the_base() {
        let resolved = |path: &str| {
            let mut path = PathBuf::from(path);
            absolute(&mut path, "/srv/vm".as_ref());
            path
        };
        assert_eq!(resolved("./bzImage"), PathBuf::from("/srv/vm/bzImage"));
        assert_eq!(resolved("../root"), PathBuf::from("/srv/vm/../root"));
        assert_eq!(resolved("."), PathBuf::from("/srv/vm"));
        assert_eq!(resolved("/x"), PathBuf::from("/x"));
    }
}
