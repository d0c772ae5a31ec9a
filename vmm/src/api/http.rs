//! The little of HTTP/1.1 (RFC 9112) that the API needs: requests without a body, and one response to a connection.

use std::fmt::Write;

/// Bytes that a request may have.
pub(super) const MAX_REQUEST: usize = 8 << 10;
/// Header fields that a message may have.
const MAX_FIELDS: usize = 64;

/// What has come of a request so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Too little to tell.
    Incomplete,
    /// All of it: the method, and what is asked for.
    Request { method: String, target: String },
    /// Nothing that could become a request.
    Malformed,
    /// More than a request may have.
    TooLarge,
}

/// Reads a request. A body is not waited for, as no method that is answered has one.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => match (request.method, request.path) {
            (Some(method), Some(target)) => {
                Parsed::Request { method: method.to_owned(), target: target.to_owned() }
            }
            _ => Parsed::Malformed,
        },
        Ok(httparse::Status::Partial) if bytes.len() < MAX_REQUEST => Parsed::Incomplete,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => Parsed::TooLarge,
        Err(_) => Parsed::Malformed,
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    /// The status code and its phrase.
    pub status: (u16, &'static str),
    /// The media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The bytes on the wire; the answer to HEAD goes without the body. The connection ends with it.
    pub(super) fn to_bytes(&self, with_body: bool) -> Vec<u8> {
        let Response { status: (code, phrase), content_type, body } = self;
        let mut head = format!(
            "HTTP/1.1 {code} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n",
            body.len()
        );
        if *code == 405 {
            // Writing to a string cannot fail.
            let _ = write!(head, "Allow: GET, HEAD\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if with_body {
            bytes.extend_from_slice(body);
        }
        bytes
    }
}

/// The status code and the body of a response that is complete. None if it is none.
pub(super) fn parse_response(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let Ok(httparse::Status::Complete(head)) = response.parse(bytes) else { return None };
    let code = response.code?;
    let length =
        response.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"))?.value;
    let length: usize = std::str::from_utf8(length).ok()?.trim().parse().ok()?;
    Some((code, bytes[head..].get(..length)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_whole_or_wrong_or_awaited() {
        let request =
            |method: &str, target: &str| Parsed::Request { method: method.into(), target: target.into() };
        assert_eq!(parse(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), request("GET", "/metrics"));
        assert_eq!(parse(b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello"), request("POST", "/"));
        assert_eq!(parse(b"GET /metrics HTT"), Parsed::Incomplete);
        assert_eq!(parse(b""), Parsed::Incomplete);
        for wrong in [&b"\x16\x03\x01\x02\0"[..], b"GET / HTTP/3.0\r\n\r\n", b"GET /\r\n\r\n", b"\0"] {
            assert_eq!(parse(wrong), Parsed::Malformed, "{wrong:?}");
        }
        let long = [b"GET /", &[b'a'; MAX_REQUEST][..]].concat();
        assert_eq!(parse(&long), Parsed::TooLarge);
        let many = ["GET / HTTP/1.1\r\n", &"a: b\r\n".repeat(100), "\r\n"].concat();
        assert_eq!(parse(many.as_bytes()), Parsed::TooLarge);
    }

    #[test]
    fn what_is_answered_is_understood() {
        let response = Response { status: (200, "OK"), content_type: "text/plain", body: b"body".to_vec() };
        let bytes = response.to_bytes(true);
        assert_eq!(parse_response(&bytes), Some((200, &b"body"[..])));
        assert_eq!(parse_response(&bytes[..bytes.len() - 1]), None);
        let head = response.to_bytes(false);
        assert!(head.ends_with(b"\r\n\r\n") && bytes.starts_with(&head));
    }
}
