//! Answers in the form in which they are kept for numbered commands, so that a
//! repetition gets the first answer: in few bytes, since each node has them for each
//! session.

use bytes::Bytes;
use conclave_core::{ids::SessionId, session::EndReason, system::ForcedRelease};
use conclave_proto::internal::{
    self, KeptAnswer,
    kept_answer::{
        Answer, Granted, NotHolder, PlaceLost, Refusal, place_lost::Loss, refusal::Refusal as Kind,
    },
};
use prost::Message as _;

use crate::{Invalid, LossReason, Rejection, Reply};

/// The reasons for which a session ends, by their codes.
const END_REASONS: [EndReason; 4] = [
    EndReason::Unknown,
    EndReason::Expired,
    EndReason::Closed,
    EndReason::Revoked,
];
/// What can be wrong with an argument, by its code.
const INVALID: [Invalid; 9] = [
    Invalid::NameEmpty,
    Invalid::NameTooLong,
    Invalid::NameWithZero,
    Invalid::NameReserved,
    Invalid::OwnerTooLong,
    Invalid::ReasonEmpty,
    Invalid::ReasonTooLong,
    Invalid::ValueTooLong,
    Invalid::ValueOfLock,
];

/// The bytes for an answer.
pub(crate) fn keep(answer: &Result<Reply, Rejection>) -> Bytes {
    let answer = match answer {
        Ok(Reply::Granted { key, token }) => Answer::Granted(Granted {
            key: key.clone(),
            token: *token,
        }),
        Ok(Reply::Released) => Answer::Released(true),
        Ok(Reply::Cancelled) => Answer::Cancelled(true),
        Ok(Reply::Proclaimed) => Answer::Proclaimed(true),
        Ok(Reply::Resigned) => Answer::Resigned(true),
        Ok(Reply::ForceReleased(_)) => unreachable!("no session asks for it, so it has no number"),
        Err(rejection) => Answer::Refused(Refusal {
            refusal: Some(refusal(rejection)),
        }),
    };
    let answer = KeptAnswer {
        answer: Some(answer),
    };
    answer.encode_to_vec().into()
}

/// The answer of these bytes. Panics if [`keep`] did not make them.
pub(crate) fn recall(bytes: &Bytes) -> Result<Reply, Rejection> {
    let kept = KeptAnswer::decode(bytes.clone());
    let answer = kept.ok().and_then(|kept| kept.answer).and_then(answer);
    answer.expect("it was kept by this machine")
}

fn refusal(rejection: &Rejection) -> Kind {
    match rejection {
        Rejection::Invalid(invalid) => Kind::Invalid(code(&INVALID, invalid)),
        Rejection::SessionEnded(reason) => Kind::SessionEnded(code(&END_REASONS, reason)),
        Rejection::Held => Kind::Held(true),
        Rejection::WaitTimedOut => Kind::WaitTimedOut(true),
        Rejection::Cancelled => Kind::Withdrawn(true),
        Rejection::PlaceLost(reason) => Kind::PlaceLost(PlaceLost {
            loss: Some(match reason {
                LossReason::SessionEnded(reason) => Loss::SessionEnded(code(&END_REASONS, reason)),
                LossReason::Forced(reason) => Loss::Forced(reason.clone()),
                LossReason::KeyDeleted => Loss::KeyDeleted(true),
            }),
        }),
        Rejection::AlreadyContending { token } => Kind::AlreadyContending(*token),
        Rejection::NotHolder { forced } => Kind::NotHolder(NotHolder {
            forced: forced.as_ref().map(forced_record),
        }),
        Rejection::NotHeld => Kind::NotHeld(true),
        Rejection::TooManyEntries => Kind::TooManyEntries(true),
        Rejection::TooManyRequests => Kind::TooManyRequests(true),
        Rejection::TooManyLocks => Kind::TooManyLocks(true),
    }
}

fn answer(answer: Answer) -> Option<Result<Reply, Rejection>> {
    Some(match answer {
        Answer::Granted(Granted { key, token }) => Ok(Reply::Granted { key, token }),
        Answer::Released(_) => Ok(Reply::Released),
        Answer::Cancelled(_) => Ok(Reply::Cancelled),
        Answer::Proclaimed(_) => Ok(Reply::Proclaimed),
        Answer::Resigned(_) => Ok(Reply::Resigned),
        Answer::Refused(refusal) => Err(rejection(refusal.refusal?)?),
    })
}

fn rejection(kind: Kind) -> Option<Rejection> {
    Some(match kind {
        Kind::Invalid(code) => Rejection::Invalid(decoded(&INVALID, code)?),
        Kind::SessionEnded(code) => Rejection::SessionEnded(decoded(&END_REASONS, code)?),
        Kind::Held(_) => Rejection::Held,
        Kind::WaitTimedOut(_) => Rejection::WaitTimedOut,
        Kind::Withdrawn(_) => Rejection::Cancelled,
        Kind::PlaceLost(lost) => Rejection::PlaceLost(match lost.loss? {
            Loss::SessionEnded(code) => LossReason::SessionEnded(decoded(&END_REASONS, code)?),
            Loss::Forced(reason) => LossReason::Forced(reason),
            Loss::KeyDeleted(_) => LossReason::KeyDeleted,
        }),
        Kind::AlreadyContending(token) => Rejection::AlreadyContending { token },
        Kind::NotHolder(NotHolder { forced }) => Rejection::NotHolder {
            forced: forced.map(forced_release),
        },
        Kind::NotHeld(_) => Rejection::NotHeld,
        Kind::TooManyEntries(_) => Rejection::TooManyEntries,
        Kind::TooManyRequests(_) => Rejection::TooManyRequests,
        Kind::TooManyLocks(_) => Rejection::TooManyLocks,
    })
}

fn code<T: PartialEq>(table: &[T], value: &T) -> u32 {
    let place = table.iter().position(|known| known == value);
    place.map_or(u32::MAX, |place| place as u32)
}

fn decoded<T: Copy>(table: &[T], code: u32) -> Option<T> {
    table.get(code as usize).copied()
}

fn forced_record(release: &ForcedRelease) -> internal::ForcedRelease {
    let ForcedRelease {
        session,
        token,
        lock,
        owner,
        reason,
    } = release;
    internal::ForcedRelease {
        session_id: session.0,
        token: *token,
        lock: lock.clone(),
        owner: owner.clone(),
        reason: reason.clone(),
    }
}

fn forced_release(record: internal::ForcedRelease) -> ForcedRelease {
    let internal::ForcedRelease {
        session_id,
        token,
        lock,
        owner,
        reason,
    } = record;
    ForcedRelease {
        session: SessionId(session_id),
        token,
        lock,
        owner,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_that_is_kept_comes_back() {
        let forced = ForcedRelease {
            session: SessionId(7),
            token: 9,
            lock: "deploy".to_owned(),
            owner: "o".to_owned(),
            reason: "stuck".to_owned(),
        };
        let key = Bytes::from_static(b"deploy/7");
        let mut answers = vec![
            Ok(Reply::Granted { key, token: 3 }),
            Ok(Reply::Released),
            Ok(Reply::Cancelled),
            Ok(Reply::Proclaimed),
            Ok(Reply::Resigned),
            Err(Rejection::Held),
            Err(Rejection::WaitTimedOut),
            Err(Rejection::Cancelled),
            Err(Rejection::PlaceLost(LossReason::KeyDeleted)),
            Err(Rejection::PlaceLost(LossReason::Forced("x".to_owned()))),
            Err(Rejection::AlreadyContending { token: 5 }),
            Err(Rejection::NotHolder { forced: None }),
            Err(Rejection::NotHolder {
                forced: Some(forced),
            }),
            Err(Rejection::NotHeld),
            Err(Rejection::TooManyEntries),
            Err(Rejection::TooManyRequests),
            Err(Rejection::TooManyLocks),
        ];
        answers.extend(INVALID.map(|invalid| Err(Rejection::Invalid(invalid))));
        answers.extend(END_REASONS.map(|end| Err(Rejection::SessionEnded(end))));
        let lost = |end| Err(Rejection::PlaceLost(LossReason::SessionEnded(end)));
        answers.extend(END_REASONS.map(lost));
        for answer in answers {
            assert_eq!(recall(&keep(&answer)), answer);
        }
    }
}
