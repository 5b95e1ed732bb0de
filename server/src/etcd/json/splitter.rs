//! Finds where JSON objects end in a body that arrives in pieces, in one pass.

use bytes::BytesMut;
use tonic::Status;

use super::forms;

/// Bytes that have come and were not taken yet.
#[derive(Debug)]
pub(super) struct Splitter {
    bytes_max: usize,
    buffer: BytesMut,
    /// So many of them were looked at.
    seen: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Splitter {
    /// For objects of up to so many bytes.
    pub(super) fn new(bytes_max: usize) -> Splitter {
        Splitter {
            bytes_max,
            buffer: BytesMut::new(),
            seen: 0,
            depth: 0,
            in_string: false,
            escaped: false,
        }
    }

    /// More bytes have come. Take what is whole before the next call.
    pub(super) fn push(&mut self, chunk: &[u8]) -> Result<(), Status> {
        if self.buffer.len() + chunk.len() > self.bytes_max {
            return Err(forms::too_large(self.bytes_max));
        }
        self.buffer.extend_from_slice(chunk);
        Ok(())
    }

    /// The first object that is whole.
    pub(super) fn take(&mut self) -> Option<BytesMut> {
        while let Some(byte) = self.buffer.get(self.seen) {
            self.seen += 1;
            if self.ends_object(*byte) {
                return Some(self.buffer.split_to(std::mem::take(&mut self.seen)));
            }
        }
        None
    }

    /// What is left at the end.
    pub(super) fn rest(&mut self) -> BytesMut {
        self.seen = 0;
        self.buffer.split()
    }

    fn ends_object(&mut self, byte: u8) -> bool {
        if self.in_string {
            let ends = byte == b'"' && !self.escaped;
            self.escaped = byte == b'\\' && !self.escaped;
            self.in_string = !ends;
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_however_they_are_cut() {
        let text = r#" {"a":"}\"{\\"} {"b":[{"c":{}}]}
{}{"d"#;
        for size in 1..text.len() {
            let mut splitter = Splitter::new(1_000);
            let mut found = Vec::new();
            for chunk in text.as_bytes().chunks(size) {
                splitter.push(chunk).unwrap();
                while let Some(object) = splitter.take() {
                    found.push(str::from_utf8(&object).unwrap().trim().to_owned());
                }
            }
            assert_eq!(found, [r#"{"a":"}\"{\\"}"#, r#"{"b":[{"c":{}}]}"#, "{}"]);
            assert_eq!(splitter.rest(), br#"{"d"#[..]);
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut splitter = Splitter::new(10);
        splitter.push(b"{\"aaaaaa").unwrap();
        assert!(splitter.take().is_none());
        assert!(splitter.push(b"aaa").is_err());
    }
}
