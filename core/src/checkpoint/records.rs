//! An [`Image`] as a row of records, and back.
//!
//! Whatever is taken apart here is taken apart in full, so that a part of the
//! state that is added later, and forgotten here, does not compile.

use std::iter;

use bytes::Bytes;
use conclave_proto::internal::{
    self, CheckpointEnded, CheckpointManifest, CheckpointMember, CheckpointPair, CheckpointPlace,
    CheckpointRecord, CheckpointRequest, CheckpointSession, CheckpointSystem, CheckpointVersion,
    checkpoint_ended, checkpoint_record::Record as Body, checkpoint_request,
};
use prost::Message as _;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Image, Part, Versions};
use crate::{
    APPLY_VERSION,
    ids::{NodeId, Revision, SessionId},
    keyspace::{Picture, Record},
    machine::Place,
    requests::{Answered, KeptReply, Requests, Slot},
    session::{EndReason, Secret, Session, Sessions},
    system::{Ended, ForcedRelease, PublishedMember, System},
};

/// The version of the format that this code writes, and the only one it reads.
const FORMAT: u32 = 1;

/// Why a row of records is no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Its writing never came to its end.
    #[error("it is not complete")]
    Incomplete,
    /// The records are not those that were written.
    #[error("its records do not agree with its manifest")]
    Mismatch,
    /// A record is damaged, or of a newer version.
    #[error("record {number} cannot be read")]
    Record {
        /// Its place in the row, from 0.
        number: u64,
    },
    /// It was written by another version.
    #[error("its format is version {found}, and this program reads version {FORMAT}")]
    Format {
        /// The version of the format.
        found: u32,
    },
    /// The cluster has settled on a meaning of commands that is too new.
    #[error("it needs apply version {needed}, and this program supports {APPLY_VERSION}")]
    ApplyVersion {
        /// The version of the cluster.
        needed: u32,
    },
}

/// The row of records of an image, the manifest last, from its parts. Each is encoded when
/// it is asked for. Without the last part, the row is not whole.
pub fn records(mut parts: impl Iterator<Item = Part>) -> impl Iterator<Item = Bytes> {
    let mut sum = Sum::default();
    let mut bodies: Box<dyn Iterator<Item = Body>> = Box::new(iter::empty());
    let mut manifest = None;
    iter::from_fn(move || {
        loop {
            if let Some(body) = bodies.next() {
                let bytes = encode(body);
                sum.add(&bytes);
                return Some(bytes);
            }
            if let Some(manifest) = manifest.take() {
                return Some(encode(Body::Manifest(sum.seal(manifest))));
            }
            match parts.next()? {
                Part::Versions(some) => bodies = Box::new(versions(some)),
                Part::Rest(image) => {
                    let (rest, last) = image.into_bodies();
                    bodies = Box::new(rest);
                    manifest = Some(last);
                }
            }
        }
    })
}

fn versions(versions: Versions) -> impl Iterator<Item = Body> {
    let Versions { live, past } = versions;
    let live = live.into_iter().map(|record| (0, record));
    live.chain(past)
        .map(|(ended, record)| Body::Version(version(ended, record)))
}

impl Image {
    /// See [`records`].
    pub fn into_records(self) -> impl Iterator<Item = Bytes> {
        records(iter::once(Part::Rest(Box::new(self))))
    }

    /// What goes before the manifest, and that.
    fn into_bodies(self) -> (impl Iterator<Item = Body>, CheckpointManifest) {
        let Self {
            cluster,
            applied,
            term,
            digest,
            keyspace,
            sessions,
            system,
        } = self;
        let Picture {
            revision,
            compacted,
            digest: keyspace_digest,
            live,
            past,
        } = keyspace;
        let bodies = versions(Versions { live, past })
            .chain(sessions.into_iter().map(|(id, s)| session(id, s)))
            .chain(system_records(system));
        let manifest = CheckpointManifest {
            format: FORMAT,
            cluster_id: cluster,
            applied,
            term,
            digest,
            revision,
            compacted,
            keyspace_digest,
            records: 0,
            hash: 0,
        };
        (bodies, manifest)
    }
}

/// Says whether records are a whole row, in their order.
#[derive(Debug, Default)]
pub(super) struct Verifier {
    sum: Sum,
    manifest: Option<CheckpointManifest>,
}

impl Verifier {
    /// Takes the next record.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<(), Invalid> {
        self.decode(bytes).map(|_| ())
    }

    /// The manifest, if the records are all, and those that were written.
    pub(super) fn finish(self) -> Result<CheckpointManifest, Invalid> {
        let manifest = self.manifest.ok_or(Invalid::Incomplete)?;
        if manifest.format != FORMAT {
            let found = manifest.format;
            return Err(Invalid::Format { found });
        }
        match self.sum.seal(manifest) == manifest {
            true => Ok(manifest),
            false => Err(Invalid::Mismatch),
        }
    }

    /// What the next record says; `None` if it is the manifest.
    fn decode(&mut self, bytes: &[u8]) -> Result<Option<Body>, Invalid> {
        let number = self.sum.records;
        let body = decode(bytes).filter(|_| self.manifest.is_none());
        match body.ok_or(Invalid::Record { number })? {
            Body::Manifest(manifest) => {
                self.manifest = Some(manifest);
                Ok(None)
            }
            body => {
                self.sum.add(bytes);
                Ok(Some(body))
            }
        }
    }
}

/// Puts an image together from its records, in their order.
#[derive(Debug, Default)]
pub struct Reader {
    verifier: Verifier,
    keyspace: Picture,
    sessions: Sessions,
    system: System,
}

impl Reader {
    /// Takes the next record.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), Invalid> {
        let number = self.verifier.sum.records;
        let Some(body) = self.verifier.decode(bytes)? else {
            return Ok(());
        };
        self.keep(body).ok_or(Invalid::Record { number })
    }

    /// The image, if the records are all, and those that were written.
    pub fn finish(self) -> Result<Image, Invalid> {
        let manifest = self.verifier.finish()?;
        let needed = self.system.apply_version();
        if needed > APPLY_VERSION {
            return Err(Invalid::ApplyVersion { needed });
        }
        let CheckpointManifest {
            format: _,
            cluster_id,
            applied,
            term,
            digest,
            revision,
            compacted,
            keyspace_digest,
            records: _,
            hash: _,
        } = manifest;
        Ok(Image {
            cluster: cluster_id,
            applied,
            term,
            digest,
            keyspace: Picture {
                revision,
                compacted,
                digest: keyspace_digest,
                ..self.keyspace
            },
            sessions: self.sessions,
            system: self.system,
        })
    }

    fn keep(&mut self, body: Body) -> Option<()> {
        match body {
            Body::Version(version) => match keyspace_record(version) {
                (0, record) => self.keyspace.live.push(record),
                ended => self.keyspace.past.push(ended),
            },
            Body::Session(session) => {
                let id = SessionId(session.id);
                if self.sessions.get(id).is_some() {
                    return None;
                }
                self.sessions.insert(id, session_of(session)?);
            }
            Body::System(system) => self.system.restore_counts(system),
            Body::Member(member) => {
                let CheckpointMember {
                    node,
                    name,
                    client_urls,
                    apply_version,
                } = member;
                let member = PublishedMember {
                    name,
                    client_urls,
                    apply_version,
                };
                self.system.members.insert(NodeId(node), member);
            }
            Body::Ended(ended) => {
                self.system.record_end(Ended {
                    session: SessionId(ended.session_id),
                    reason: end_reason(ended.reason())?,
                    secret: secret_of(&ended.secret)?,
                });
            }
            Body::Forced(forced) => self.system.record_forced(forced_release(forced)),
            Body::Manifest(_) => return None,
        }
        Some(())
    }
}

/// What the records before the manifest add up to.
#[derive(Debug, Default)]
struct Sum {
    records: u64,
    /// Of each record, seeded with that of the one before.
    hash: u64,
}

impl Sum {
    fn add(&mut self, record: &[u8]) {
        self.records += 1;
        self.hash = xxh3_64_with_seed(record, self.hash);
    }

    /// The manifest for these records. Its hash covers itself, too.
    fn seal(&self, manifest: CheckpointManifest) -> CheckpointManifest {
        let mut sealed = CheckpointManifest {
            records: self.records,
            hash: 0,
            ..manifest
        };
        sealed.hash = xxh3_64_with_seed(&sealed.encode_to_vec(), self.hash);
        sealed
    }
}

fn encode(body: Body) -> Bytes {
    let record = CheckpointRecord { record: Some(body) };
    record.encode_to_vec().into()
}

/// Decodes a record in full: what this version would drop on the way is unknown
/// to it. Keys and values are copies of their own: none keeps another in memory.
fn decode(bytes: &[u8]) -> Option<Body> {
    let record = CheckpointRecord::decode(bytes).ok()?;
    if record.encoded_len() == bytes.len() {
        record.record
    } else {
        None
    }
}

fn version(ended_revision: Revision, record: Record) -> CheckpointVersion {
    let Record {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease,
    } = record;
    CheckpointVersion {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease: lease.map(|session| session.0),
        ended_revision,
    }
}

fn keyspace_record(version: CheckpointVersion) -> (Revision, Record) {
    let CheckpointVersion {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease,
        ended_revision,
    } = version;
    let record = Record {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease: lease.map(SessionId),
    };
    (ended_revision, record)
}

fn session(id: SessionId, session: Session) -> Body {
    let Session {
        ttl_ms,
        name,
        metadata,
        opened_revision,
        opened_at,
        secret,
        requests,
    } = session;
    let metadata = metadata.into_iter();
    #[cfg(conclave_plant)]
    let requests = match crate::plant::is("requests-left-out-of-checkpoint") {
        true => Requests::default(),
        false => requests,
    };
    let Requests {
        attachment,
        nonce,
        watermark,
        slots,
        bytes: _,
    } = requests;
    Body::Session(CheckpointSession {
        id: id.0,
        ttl_ms,
        name,
        metadata: metadata
            .map(|(key, value)| CheckpointPair { key, value })
            .collect(),
        opened_revision,
        opened_at_ms: opened_at,
        secret: secret_bytes(secret),
        attachment,
        attached_by: nonce,
        watermark,
        requests: slots.into_iter().map(request).collect(),
    })
}

fn session_of(session: CheckpointSession) -> Option<Session> {
    let CheckpointSession {
        id: _,
        ttl_ms,
        name,
        metadata,
        opened_revision,
        opened_at_ms,
        secret,
        attachment,
        attached_by: nonce,
        watermark,
        requests: slots,
    } = session;
    let metadata = metadata.into_iter();
    let mut requests = Requests {
        attachment,
        nonce,
        watermark,
        ..Requests::default()
    };
    for slot in slots {
        let (number, slot) = slot_of(slot)?;
        requests.set(number, slot);
    }
    Some(Session {
        ttl_ms,
        name,
        metadata: metadata.map(|pair| (pair.key, pair.value)).collect(),
        opened_revision,
        opened_at: opened_at_ms,
        secret: secret_of(&secret)?,
        requests,
    })
}

fn request((number, slot): (u64, Slot)) -> CheckpointRequest {
    use checkpoint_request::Slot as Code;
    let (slot, revision) = match slot {
        Slot::Expected => (Code::Expected(true), 0),
        Slot::Waiting(Place { revision, key }) => {
            (Code::Waiting(CheckpointPlace { revision, key }), 0)
        }
        Slot::Answered(Answered { revision, reply }) => match reply {
            KeptReply::Machine(reply) => (Code::Reply(reply), revision),
            KeptReply::NoSpace => (Code::NoSpace(true), revision),
        },
    };
    CheckpointRequest {
        number,
        slot: Some(slot),
        revision,
    }
}

fn slot_of(request: CheckpointRequest) -> Option<(u64, Slot)> {
    use checkpoint_request::Slot as Code;
    let CheckpointRequest {
        number,
        slot,
        revision,
    } = request;
    let answered = |reply| Slot::Answered(Answered { revision, reply });
    let slot = match slot? {
        Code::Expected(_) => Slot::Expected,
        Code::Waiting(CheckpointPlace { revision, key }) => Slot::Waiting(Place { revision, key }),
        Code::Reply(reply) => answered(KeptReply::Machine(reply)),
        Code::NoSpace(_) => answered(KeptReply::NoSpace),
    };
    Some((number, slot))
}

fn secret_bytes(secret: Option<Secret>) -> Bytes {
    secret.map_or(Bytes::new(), |secret| {
        Bytes::copy_from_slice(secret.bytes())
    })
}

/// `None` if it is neither a secret nor none.
fn secret_of(bytes: &Bytes) -> Option<Option<Secret>> {
    if bytes.is_empty() {
        return Some(None);
    }
    Secret::new(bytes).map(Some)
}

fn system_records(system: System) -> impl Iterator<Item = Body> {
    let System {
        log_time,
        date_ms,
        sessions_opened,
        members,
        publications,
        apply_version,
        out_of_space,
        ended,
        ended_by_id: _,
        ended_by_secret: _,
        forced,
    } = system;
    let counts = Body::System(CheckpointSystem {
        log_time_ms: log_time,
        date_ms,
        sessions_opened,
        publications,
        apply_version,
        out_of_space: out_of_space.into_iter().map(|node| node.0).collect(),
    });
    let members = members.into_iter().map(|(node, member)| {
        let PublishedMember {
            name,
            client_urls,
            apply_version,
        } = member;
        Body::Member(CheckpointMember {
            node: node.0,
            name,
            client_urls,
            apply_version,
        })
    });
    let ended = ended.into_iter().map(|ended| {
        let Ended {
            session,
            reason,
            secret,
        } = ended;
        Body::Ended(CheckpointEnded {
            session_id: session.0,
            reason: reason_code(reason).into(),
            secret: secret_bytes(secret),
        })
    });
    let forced = forced.into_values().map(forced_record);
    iter::once(counts).chain(members).chain(ended).chain(forced)
}

fn forced_record(release: ForcedRelease) -> Body {
    let ForcedRelease {
        session,
        token,
        lock,
        owner,
        reason,
    } = release;
    Body::Forced(internal::ForcedRelease {
        session_id: session.0,
        token,
        lock,
        owner,
        reason,
    })
}

fn forced_release(forced: internal::ForcedRelease) -> ForcedRelease {
    let internal::ForcedRelease {
        session_id,
        token,
        lock,
        owner,
        reason,
    } = forced;
    ForcedRelease {
        session: SessionId(session_id),
        token,
        lock,
        owner,
        reason,
    }
}

fn reason_code(reason: EndReason) -> checkpoint_ended::Reason {
    match reason {
        EndReason::Expired => checkpoint_ended::Reason::Expired,
        EndReason::Closed => checkpoint_ended::Reason::Closed,
        EndReason::Revoked => checkpoint_ended::Reason::Revoked,
        EndReason::Unknown => checkpoint_ended::Reason::Unknown,
    }
}

/// No session is on record as ended for a reason that is not known.
fn end_reason(reason: checkpoint_ended::Reason) -> Option<EndReason> {
    match reason {
        checkpoint_ended::Reason::Expired => Some(EndReason::Expired),
        checkpoint_ended::Reason::Closed => Some(EndReason::Closed),
        checkpoint_ended::Reason::Revoked => Some(EndReason::Revoked),
        checkpoint_ended::Reason::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests() -> Requests {
        let mut requests = Requests {
            attachment: 2,
            nonce: 8,
            watermark: 3,
            ..Requests::default()
        };
        let answered = |reply| Slot::Answered(Answered { revision: 4, reply });
        requests.set(2, Slot::Expected);
        let place = Place {
            revision: 3,
            key: "n/7".into(),
        };
        requests.set(4, Slot::Waiting(place));
        requests.set(5, answered(KeptReply::Machine("reply".into())));
        requests.set(7, answered(KeptReply::NoSpace));
        requests
    }

    fn image() -> Image {
        let record = |key: &'static str, lease| Record {
            key: key.into(),
            value: "value".into(),
            create_revision: 2,
            mod_revision: 3,
            version: 2,
            lease,
        };
        let mut sessions = Sessions::default();
        let opened = Session {
            ttl_ms: 1_000,
            name: "s".to_owned(),
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            opened_revision: 1,
            opened_at: 5,
            secret: Secret::new(&[3; 16]),
            requests: requests(),
        };
        sessions.insert(SessionId(7), opened);
        let mut system = System::default();
        system.stamp(90, 80);
        system.count_session();
        for (session, secret) in [(6, None), (5, Secret::new(&[5; 16]))] {
            system.record_end(Ended {
                session: SessionId(session),
                reason: EndReason::Expired,
                secret,
            });
        }
        Image {
            cluster: 1,
            applied: 10,
            term: 2,
            digest: 3,
            keyspace: Picture {
                revision: 4,
                compacted: 2,
                digest: 5,
                live: vec![record("a", Some(SessionId(7))), record("b", None)],
                past: vec![(4, record("c", None))],
            },
            sessions,
            system,
        }
    }

    fn read(records: impl IntoIterator<Item = Bytes>) -> Result<Image, Invalid> {
        let mut reader = Reader::default();
        for record in records {
            reader.take(&record)?;
        }
        reader.finish()
    }

    #[test]
    fn an_image_is_read_back() {
        let read = read(image().into_records()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{:?}", image()));
    }

    #[test]
    fn a_row_that_is_not_whole_is_refused() {
        let whole: Vec<Bytes> = image().into_records().collect();
        for length in 0..whole.len() {
            let cut = whole[..length].iter().cloned();
            assert_eq!(read(cut).unwrap_err(), Invalid::Incomplete);
        }
        for missing in 0..whole.len() - 1 {
            let mut row = whole.clone();
            row.remove(missing);
            assert_eq!(read(row).unwrap_err(), Invalid::Mismatch, "{missing}");
        }
        for place in 1..whole.len() - 1 {
            let mut row = whole.clone();
            row.swap(place - 1, place);
            read(row).unwrap_err();
        }
        read(whole.iter().chain(&whole[..1]).cloned()).unwrap_err();
    }

    #[test]
    fn no_changed_bit_of_a_record_goes_unnoticed() {
        let whole: Vec<Bytes> = image().into_records().collect();
        for (place, record) in whole.iter().enumerate() {
            for bit in 0..record.len() * 8 {
                let mut row = whole.clone();
                let mut damaged = record.to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                row[place] = damaged.into();
                assert!(read(row).is_err(), "bit {bit} of record {place}");
            }
        }
    }

    #[test]
    fn another_format_and_unknown_fields_are_refused() {
        let mut row: Vec<Bytes> = image().into_records().collect();
        let Some(Body::Manifest(manifest)) = decode(&row.pop().unwrap()) else {
            panic!("the last record is the manifest");
        };
        let mut newer = row.clone();
        let format = FORMAT + 1;
        newer.push(encode(Body::Manifest(CheckpointManifest {
            format,
            ..manifest
        })));
        assert_eq!(read(newer).unwrap_err(), Invalid::Format { found: format });
        let unknown = [&row[0][..], &[0x78, 1]].concat();
        row[0] = unknown.into();
        assert_eq!(read(row).unwrap_err(), Invalid::Record { number: 0 });
    }
}
