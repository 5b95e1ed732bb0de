//! Elections, against a real server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::time::Duration;

use conclave_proto::v1::{
    self, CampaignRequest, ProclaimRequest, RequestNumber, ResignRequest, session_event::Event,
};
use harness::{Client, Directory, Node, PATIENCE, acquire, reason};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

fn campaign(session_id: i64, value: &'static str) -> CampaignRequest {
    CampaignRequest {
        name: "db".to_owned(),
        session_id,
        value: value.into(),
        ..CampaignRequest::default()
    }
}

fn numbered(request: u64) -> Option<RequestNumber> {
    Some(RequestNumber {
        request,
        ..RequestNumber::default()
    })
}

fn resign(session_id: i64, term: u64) -> ResignRequest {
    ResignRequest {
        name: "db".to_owned(),
        session_id,
        term,
        ..ResignRequest::default()
    }
}

async fn lead(client: &Client, request: CampaignRequest) -> Result<u64, Status> {
    let answer = timeout(PATIENCE, client.elections().campaign(request)).await;
    Ok(answer
        .expect("it neither leads nor is refused")?
        .into_inner()
        .term)
}

async fn proclaim(client: &Client, session_id: i64, term: u64, value: &str) -> Result<(), Status> {
    let request = ProclaimRequest {
        name: "db".to_owned(),
        session_id,
        term,
        value: value.to_owned().into(),
        ..ProclaimRequest::default()
    };
    client.elections().proclaim(request).await.map(drop)
}

async fn leader(client: &Client) -> Option<v1::Leader> {
    let request = v1::LeaderRequest {
        name: "db".to_owned(),
    };
    let answer = client.elections().leader(request).await.unwrap();
    answer.into_inner().leader
}

/// How many contend for the election.
async fn candidates(client: &Client) -> u64 {
    let request = v1::ListElectionsRequest {
        name: "db".to_owned(),
        ..Default::default()
    };
    let listed = client.elections().list(request).await.unwrap().into_inner();
    let first = listed.elections.first();
    first.map_or(0, |election| election.candidates_total)
}

async fn until_candidates(client: &Client, count: u64) {
    let wait = async {
        while candidates(client).await != count {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("there are never so many candidates");
}

#[tokio::test]
async fn one_leads_at_a_time_and_only_it_proclaims() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    assert_eq!(leader(&client).await, None);
    let first = lead(&client, campaign(a, "a:1")).await.unwrap();
    let other = client.clone();
    let waiting = tokio::spawn(async move { lead(&other, campaign(b, "b:1")).await });
    until_candidates(&client, 2).await;
    proclaim(&client, a, first, "a:2").await.unwrap();
    let now = leader(&client).await.unwrap();
    assert_eq!(
        (now.term, &now.value[..], now.session_id),
        (first, &b"a:2"[..], a)
    );
    assert!(now.proclaimed_revision > first);
    assert_eq!(now.key, format!("db/{a:x}"));
    for (session, term) in [(b, first), (a, first + 1)] {
        let refused = proclaim(&client, session, term, "x").await.unwrap_err();
        assert_eq!(reason(&refused), "NOT_HOLDER");
    }
    client.elections().resign(resign(a, first)).await.unwrap();
    let second = waiting.await.unwrap().unwrap();
    assert!(second > first);
    let stale = client.elections().resign(resign(a, first)).await;
    assert_eq!(reason(&stale.unwrap_err()), "NOT_HOLDER");
    let now = leader(&client).await.unwrap();
    assert_eq!((now.term, &now.value[..]), (second, &b"b:1"[..]));
    let held = client
        .locks()
        .check(v1::CheckRequest {
            name: "db".to_owned(),
            token: second,
        })
        .await;
    assert!(held.unwrap().into_inner().held);
}

#[tokio::test]
async fn a_campaign_that_would_wait_too_long_is_refused_and_leaves_nothing() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    lead(&client, campaign(a, "a")).await.unwrap();
    for (wait_ms, expected) in [(0, "LOCK_HELD"), (30, "WAIT_TIMED_OUT")] {
        let request = CampaignRequest {
            wait_ms: Some(wait_ms),
            ..campaign(b, "b")
        };
        let refused = lead(&client, request).await.unwrap_err();
        assert_eq!(reason(&refused), expected);
    }
    // Dropped, a call without a number is withdrawn.
    let abandoned = timeout(Duration::from_millis(100), lead(&client, campaign(b, "b"))).await;
    assert!(abandoned.is_err());
    until_candidates(&client, 1).await;
    let long = CampaignRequest {
        value: vec![0; (64 << 10) + 1].into(),
        ..campaign(b, "")
    };
    let refused = lead(&client, long).await.unwrap_err();
    assert_eq!(
        (refused.code(), &reason(&refused)[..]),
        (Code::InvalidArgument, "INVALID_VALUE")
    );
    let nobody = lead(&client, campaign(77, "x")).await.unwrap_err();
    assert_eq!(reason(&nobody), "SESSION_NOT_FOUND");
}

#[tokio::test]
async fn numbers_make_every_call_safe_to_repeat() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let a = client.open("a").await;
    let first = CampaignRequest {
        number: numbered(1),
        ..campaign(a, "a")
    };
    let term = lead(&client, first.clone()).await.unwrap();
    assert_eq!(lead(&client, first.clone()).await.unwrap(), term);
    let give_up = ResignRequest {
        number: numbered(2),
        ..resign(a, term)
    };
    for _ in 0..2 {
        client.elections().resign(give_up.clone()).await.unwrap();
    }
    assert_eq!(
        lead(&client, first).await.unwrap(),
        term,
        "the answer is that of then"
    );
    assert_eq!(leader(&client).await, None);
    // A number that was that of something else.
    let another = CampaignRequest {
        number: numbered(2),
        ..campaign(a, "a")
    };
    let refused = lead(&client, another).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let lock = v1::AcquireRequest {
        number: numbered(3),
        ..acquire("lock", a, None)
    };
    client.acquire(lock).await.unwrap();
    let another = CampaignRequest {
        number: numbered(3),
        ..campaign(a, "a")
    };
    assert_eq!(
        lead(&client, another).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    // Cancelled, it leads no more.
    let again = CampaignRequest {
        number: numbered(4),
        ..campaign(a, "a")
    };
    lead(&client, again).await.unwrap();
    let cancel = v1::CancelRequest {
        name: "db".to_owned(),
        session_id: a,
        request: 4,
        ..Default::default()
    };
    client.elections().cancel(cancel).await.unwrap();
    assert_eq!(candidates(&client).await, 0);
}

#[tokio::test]
async fn a_leader_that_is_deposed_hears_why() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let a = client.open("a").await;
    let term = lead(&client, campaign(a, "a")).await.unwrap();
    let watch = v1::WatchSessionsRequest {
        session_id: a,
        attachment: 0,
    };
    let requests = tokio_stream::iter([watch]);
    // The stream of requests stays open.
    let requests = tokio_stream::StreamExt::chain(requests, tokio_stream::pending());
    let mut events = client
        .sessions()
        .watch(requests)
        .await
        .unwrap()
        .into_inner();
    let attached = timeout(PATIENCE, events.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let Some(Event::Attached(attached)) = attached.event else {
        panic!("not attached");
    };
    let grants: Vec<_> = attached
        .grants
        .iter()
        .map(|g| (g.token, g.candidate))
        .collect();
    assert_eq!(grants, [(term, true)]);
    let force = v1::ForceReleaseRequest {
        name: "db".to_owned(),
        reason: "drain".to_owned(),
        ..Default::default()
    };
    let taken = client.locks().force_release(force).await.unwrap();
    assert!(taken.into_inner().released.unwrap().candidate);
    let lost = timeout(PATIENCE, events.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let Some(Event::GrantLost(lost)) = lost.event else {
        panic!("nothing was lost");
    };
    let grant = lost.grant.unwrap();
    assert_eq!(
        (&lost.detail[..], grant.token, grant.candidate),
        ("drain", term, true)
    );
}
