//! Notices as the client library gets them, over the etcd API.

use conclave_core::{
    ids::Revision,
    keyspace::{Event, Record},
};
use conclave_proto::etcd::{
    etcdserverpb::{ResponseHeader, WatchResponse},
    mvccpb::{self, KeyValue, event::EventType},
};

pub(super) fn created(revision: Revision) -> WatchResponse {
    WatchResponse {
        created: true,
        ..progress(revision)
    }
}

pub(super) fn events(revision: Revision, events: &[Event]) -> WatchResponse {
    WatchResponse {
        events: events.iter().map(event).collect(),
        ..progress(revision)
    }
}

pub(super) fn progress(revision: Revision) -> WatchResponse {
    let header = ResponseHeader {
        revision: revision.cast_signed(),
        ..ResponseHeader::default()
    };
    WatchResponse {
        header: Some(header),
        ..WatchResponse::default()
    }
}

fn event(event: &Event) -> mvccpb::Event {
    let kind = match event.after {
        Some(_) => EventType::Put,
        None => EventType::Delete,
    };
    let deleted = || KeyValue {
        key: event.key.clone(),
        mod_revision: event.revision.cast_signed(),
        ..KeyValue::default()
    };
    mvccpb::Event {
        r#type: kind.into(),
        kv: Some(event.after.as_ref().map_or_else(deleted, key_value)),
        prev_kv: event.before.as_ref().map(key_value),
    }
}

fn key_value(record: &Record) -> KeyValue {
    KeyValue {
        key: record.key.clone(),
        create_revision: record.create_revision.cast_signed(),
        mod_revision: record.mod_revision.cast_signed(),
        version: record.version.cast_signed(),
        value: record.value.clone(),
        lease: record.lease.map_or(0, |session| session.0),
    }
}
