//! Requests that nobody would send, to every call that clients can make: random
//! bytes, random fields of the right types, and valid requests with some bytes
//! changed. The server answers, whatever it answers, and does not panic.
//!
//! Also what kills the reference, which is therefore sent to ours alone.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use conclave_proto::{
    DESCRIPTORS,
    etcd::{
        authpb::Permission,
        etcdserverpb::{
            AlarmRequest, AuthRoleGrantPermissionRequest, RangeRequest, auth_client::AuthClient,
            kv_client::KvClient, maintenance_client::MaintenanceClient,
        },
    },
};
use prost::Message as _;
use prost_types::{
    DescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

use crate::{generate::Draw, reference::serving, support::Cluster};

/// Requests of a run, unless `CONCLAVE_ETCD_CASES` says how many.
const REQUESTS: u64 = 3_000;
/// A call that waits is cancelled.
const DEADLINE: Duration = Duration::from_millis(50);
/// Nested messages go so deep.
const DEPTH: u32 = 4;

/// A call, as the schemas describe it.
struct Call {
    path: String,
    input: String,
}

struct Schemas {
    set: FileDescriptorSet,
    calls: Vec<Call>,
}

impl Schemas {
    fn read() -> Self {
        let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let mut calls = Vec::new();
        for file in &set.file {
            // What members say to each other is not on this port.
            if file.package() == "conclave.internal" {
                continue;
            }
            for service in &file.service {
                for method in &service.method {
                    let service = format!("{}.{}", file.package(), service.name());
                    calls.push(Call {
                        path: format!("/{service}/{}", method.name()),
                        input: method.input_type().to_owned(),
                    });
                }
            }
        }
        Self { set, calls }
    }

    fn message(&self, full_name: &str) -> Option<&DescriptorProto> {
        self.set.file.iter().find_map(|file| {
            let prefix = format!(".{}.", file.package());
            let mut names = full_name.strip_prefix(&prefix)?.split('.');
            let first = names.next()?;
            let message = file.message_type.iter().find(|m| m.name() == first)?;
            names.try_fold(message, |outer, name| {
                outer.nested_type.iter().find(|m| m.name() == name)
            })
        })
    }

    /// A message of this type with some of its fields, each of its type.
    fn draw(&self, name: &str, draw: &mut Draw, depth: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Some(message) = self.message(name) else {
            return bytes;
        };
        for field in &message.field {
            let repeated = field.label() == Label::Repeated;
            let most = if repeated { 3 } else { 1 };
            for _ in 0..draw.below(most + 1) {
                let number = u64::try_from(field.number()).unwrap();
                match field.r#type() {
                    Type::Message if depth > 0 => {
                        let inner = self.draw(field.type_name(), draw, depth - 1);
                        length_delimited(number, &inner, &mut bytes);
                    }
                    Type::Message => {}
                    Type::Bytes | Type::String => {
                        let words: [&[u8]; 8] = [
                            b"",
                            b"a",
                            b"\0",
                            b"a/1",
                            b"_conclave/lock/a",
                            b"b",
                            b"root",
                            b"\xff\xfe",
                        ];
                        length_delimited(number, draw.pick(&words), &mut bytes);
                    }
                    Type::Double | Type::Float => {}
                    _ => {
                        let value = match draw.below(5) {
                            0 => draw.next(),
                            1 => u64::MAX,
                            2 => 1 << 63,
                            _ => draw.below(12),
                        };
                        varint(number << 3, &mut bytes);
                        varint(value, &mut bytes);
                    }
                }
            }
        }
        bytes
    }
}

fn length_delimited(number: u64, inner: &[u8], bytes: &mut Vec<u8>) {
    varint(number << 3 | 2, bytes);
    varint(inner.len() as u64, bytes);
    bytes.extend_from_slice(inner);
}

fn varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap());
}

/// Some bytes changed, lost, added.
fn mutated(mut bytes: Vec<u8>, draw: &mut Draw) -> Vec<u8> {
    for _ in 0..=draw.below(3) {
        let at = usize::try_from(draw.below(bytes.len() as u64 + 1)).unwrap();
        let byte = u8::try_from(draw.below(256)).unwrap();
        match draw.below(4) {
            0 => bytes.insert(at, byte),
            1 => bytes.truncate(at),
            _ if at == bytes.len() => bytes.push(byte),
            2 => bytes[at] = byte,
            _ => drop(bytes.remove(at)),
        }
    }
    bytes
}

/// Sends and takes messages as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Streams both ways serve every kind of call. Takes a few answers.
async fn send(channel: &Channel, path: &str, messages: Vec<Bytes>) {
    const ANSWERS: usize = 4;
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::iter(messages));
    request.set_timeout(DEADLINE);
    let call = client.streaming(request, path.parse().unwrap(), Raw);
    let taken = tokio::time::timeout(DEADLINE, async {
        let mut answers = call.await?.into_inner();
        for _ in 0..ANSWERS {
            answers.message().await?;
        }
        Ok::<_, Status>(())
    });
    // Any answer will do, and none within the deadline.
    taken.await.ok();
}

/// The server runs, answers, and has never panicked.
async fn unharmed(cluster: &mut Cluster, what: &str) {
    assert!(cluster.is_running(0), "ended by {what}");
    let endpoint = &cluster.endpoints()[0];
    serving(endpoint).await;
    let log = cluster.log(0);
    assert!(!log.contains("panicked"), "{what}: {log}");
}

#[tokio::test]
async fn no_request_harms_a_server() {
    let mut cluster = Cluster::start("etcd-fuzz", 1);
    let channel = serving(&cluster.endpoints()[0]).await;
    let schemas = Schemas::read();
    assert!(schemas.calls.len() > 42, "the calls of etcd are missing");
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let first = number("CONCLAVE_ETCD_SEED").unwrap_or(1);
    let count = number("CONCLAVE_ETCD_CASES").unwrap_or(REQUESTS);
    for seed in first..first + count {
        let mut draw = Draw::new(seed);
        let at = usize::try_from(seed).unwrap() % schemas.calls.len();
        let call = &schemas.calls[at];
        let messages: Vec<_> = (0..=draw.below(3))
            .map(|_| {
                let valid = schemas.draw(&call.input, &mut draw, DEPTH);
                Bytes::from(match draw.below(4) {
                    0 => {
                        let length = draw.below(40);
                        (0..length)
                            .map(|_| u8::try_from(draw.below(256)).unwrap())
                            .collect()
                    }
                    1 => mutated(valid, &mut draw),
                    _ => valid,
                })
            })
            .collect();
        send(&channel, &call.path, messages.clone()).await;
        if seed % 100 == 0 || count < 100 {
            unharmed(
                &mut cluster,
                &format!("seed {seed}: {} {messages:?}", call.path),
            )
            .await;
        }
    }
    unharmed(&mut cluster, "any of them").await;
    // Nothing in the log ends the next start either.
    cluster.kill(0);
    cluster.spawn(0);
    unharmed(&mut cluster, "what is in the log").await;
}

#[tokio::test]
async fn what_kills_the_reference_is_answered() {
    let mut cluster = Cluster::start("etcd-killers", 1);
    let channel = serving(&cluster.endpoints()[0]).await;
    let range = RangeRequest {
        key: "a".into(),
        range_end: "z".into(),
        sort_target: 9,
        ..RangeRequest::default()
    };
    let refused = KvClient::new(channel.clone())
        .range(range)
        .await
        .unwrap_err();
    assert_eq!(refused.message(), "etcdserver: invalid sort option");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let alarm = AlarmRequest {
        action: 1,
        alarm: 0,
        member_id: 0,
    };
    // Whether it is refused or does nothing is ours to say.
    let alarmed = MaintenanceClient::new(channel.clone()).alarm(alarm).await;
    if let Ok(response) = alarmed {
        assert!(response.into_inner().alarms.is_empty());
    }
    for perm in [None, Some(Permission::default())] {
        let grant = AuthRoleGrantPermissionRequest {
            name: "role".to_owned(),
            perm,
        };
        AuthClient::new(channel.clone())
            .role_grant_permission(grant)
            .await
            .expect_err("there are no roles");
    }
    unharmed(&mut cluster, "what kills the reference").await;
    cluster.kill(0);
    cluster.spawn(0);
    unharmed(&mut cluster, "its log").await;
}
