//! How keys, values and leases are printed. They may be any bytes.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use conclave_client::{Event, EventKind, KeyValue};
use serde_json::{Value, json};

use crate::output::session_hex;

/// Bytes as people see them: text as it is, all else as escapes.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if c.is_control() => shown.extend(c.escape_default()),
                c => shown.push(c),
            }
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    shown
}

/// Puts bytes into a JSON object: as text if they are, else in base64 under a name
/// that says so.
pub(crate) fn put_bytes(object: &mut Value, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object[name] = text.into(),
        Err(_) => object[format!("{name}_base64")] = STANDARD.encode(bytes).into(),
    }
}

/// A key with its value, for programs.
pub(crate) fn key_value(kv: &KeyValue, with_value: bool) -> Value {
    let mut shown = json!({
        "create_revision": kv.create_revision,
        "mod_revision": kv.mod_revision,
        "version": kv.version,
    });
    put_bytes(&mut shown, "key", &kv.key);
    if with_value {
        put_bytes(&mut shown, "value", &kv.value);
    }
    if kv.lease != 0 {
        shown["lease_id"] = session_hex(kv.lease).into();
    }
    shown
}

/// The titles of [`row`].
pub(crate) const TITLES: [&str; 6] = ["KEY", "VALUE", "VERSION", "CREATED", "MODIFIED", "LEASE"];

/// A key with its value, for people.
pub(crate) fn row(kv: &KeyValue) -> Vec<String> {
    vec![
        shown(&kv.key),
        shown(&kv.value),
        kv.version.to_string(),
        kv.create_revision.to_string(),
        kv.mod_revision.to_string(),
        session_hex(kv.lease),
    ]
}

/// What happened, in a word.
pub(crate) fn kind(event: &Event) -> &'static str {
    match event.kind {
        EventKind::Put => "put",
        EventKind::Delete => "delete",
    }
}

/// A change, for programs.
pub(crate) fn event(event: &Event) -> Value {
    let is_put = event.kind == EventKind::Put;
    let mut shown = key_value(&event.kv, is_put);
    shown["type"] = kind(event).into();
    shown["revision"] = event.kv.mod_revision.into();
    if let Some(previous) = &event.previous {
        shown["previous"] = key_value(previous, true);
    }
    shown
}

/// A change, for people.
pub(crate) fn event_line(event: &Event) -> String {
    let mut line = format!(
        "{}  {}  {}",
        event.kv.mod_revision,
        kind(event),
        shown(&event.kv.key)
    );
    if event.kind == EventKind::Put {
        line.push_str(&format!("  {}", shown(&event.kv.value)));
    }
    if let Some(previous) = &event.previous {
        line.push_str(&format!("  (before: {})", shown(&previous.value)));
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_can_be_shown() {
        assert_eq!(shown("grün \\ {}".as_bytes()), "grün \\ {}");
        assert_eq!(shown(b"a\xff\n\x00b\xc3"), "a\\xff\\n\\u{0}b\\xc3");
        let mut object = json!({});
        put_bytes(&mut object, "key", b"a");
        put_bytes(&mut object, "value", b"\xff");
        assert_eq!(object, json!({ "key": "a", "value_base64": "/w==" }));
    }
}
