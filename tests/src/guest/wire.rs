//! Lines on a console that others write to as well.

use std::io::{self, BufRead, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first line of the guest's init, for those who measure.
pub const INIT: &str = "INIT";

/// The line that says that the agent listens.
pub const READY: &str = "READY";

/// What a line on the console was.
#[derive(Debug)]
pub enum Line<T> {
    /// A message of the other side.
    Message(T),
    /// Anything else: the kernel's.
    Other(String),
}

/// Reads the next line; `None` at the end of the stream. A line that starts with `@` and is no message is an error: a
/// message was damaged, and waiting for it would only hide that.
pub fn read_line<T: DeserializeOwned>(input: &mut impl BufRead) -> io::Result<Option<Line<T>>> {
    let mut raw = Vec::new();
    if input.read_until(b'\n', &mut raw)? == 0 {
        return Ok(None);
    }
    let line = raw.trim_ascii_end();
    let Some(json) = line.strip_prefix(b"@") else {
        return Ok(Some(Line::Other(String::from_utf8_lossy(line).into_owned())));
    };
    let message = serde_json::from_slice(json).map_err(|source| {
        let shown = String::from_utf8_lossy(&json[..json.len().min(200)]).into_owned();
        io::Error::new(io::ErrorKind::InvalidData, format!("a damaged message, {source}: @{shown}"))
    })?;
    Ok(Some(Line::Message(message)))
}

/// Writes a message as one line and in one piece.
pub fn write_line(output: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = vec![b'@'];
    serde_json::to_writer(&mut line, message)?;
    line.push(b'\n');
    output.write_all(&line)?;
    output.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_other_lines_are_told_apart() -> io::Result<()> {
        let mut stream = b"[    0.1] kernel \xff\r\n".to_vec();
        let long = "x".repeat(100_000);
        write_line(&mut stream, &long)?;
        stream.extend_from_slice(b"tail");
        let mut input = &stream[..];
        assert!(
            matches!(read_line::<String>(&mut input)?, Some(Line::Other(text)) if text.contains("kernel"))
        );
        assert!(matches!(read_line::<String>(&mut input)?, Some(Line::Message(text)) if text == long));
        assert!(matches!(read_line::<String>(&mut input)?, Some(Line::Other(text)) if text == "tail"));
        assert!(read_line::<String>(&mut input)?.is_none());
        Ok(())
    }

    #[test]
    fn a_damaged_message_is_an_error() {
        assert!(read_line::<String>(&mut &b"@\"cut[ 1.0] oops\n"[..]).is_err());
    }
}
