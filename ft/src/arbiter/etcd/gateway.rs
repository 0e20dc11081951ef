//! One member of an etcd cluster, asked through its JSON gateway (`/v3/...`, etcd 3.4 and later).
//!
//! Nothing here is asked twice and nothing is remembered: a request is answered within [`ANSWER`] or has
//! failed, and then it may or may not have taken effect. All reads are linearizable: they and every
//! transaction need a majority of the cluster, so a member that is cut off from it gives no answer.

use std::io::{self, ErrorKind};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::super::Endpoint;

/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(1);
/// Time for a whole request. Longer than etcd takes to choose a new leader.
pub(super) const ANSWER: Duration = Duration::from_secs(2);
/// Longer answers are none of etcd's to these requests.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
/// Of a refusal's text.
const MAX_REFUSAL_CHARS: usize = 200;

/// One member.
pub(super) struct Member {
    agent: ureq::Agent,
    base: String,
}

/// The value of a key, byte for byte; `None` where there is no such key.
pub(super) type Stored = Option<Vec<u8>>;

#[derive(Deserialize)]
struct RangeAnswer {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct TxnAnswer {
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<TxnResponse>,
}

#[derive(Deserialize)]
struct TxnResponse {
    response_range: Option<RangeAnswer>,
}

#[derive(Deserialize)]
struct AnyAnswer {
    header: Header,
}

#[derive(Deserialize)]
struct Header {
    cluster_id: String,
}

#[derive(Deserialize)]
struct LeaseAnswer {
    #[serde(rename = "ID")]
    id: String,
}

/// How a transaction went.
pub(super) enum Swapped {
    /// The key holds the new value.
    Yes,
    /// It held this instead of what was expected.
    No(Stored),
}

impl Member {
    pub(super) fn new(endpoint: &Endpoint) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(ANSWER))
            .http_status_as_error(false)
            .max_redirects(0)
            // What the environment says about browsing must not come between a VM and its arbiter.
            .proxy(None)
            .max_idle_connections(0)
            .build();
        Self { agent: config.into(), base: format!("http://{endpoint}/v3") }
    }

    /// What the key holds, as a majority knows it.
    pub(super) fn get(&self, key: &str) -> io::Result<Stored> {
        let answer: RangeAnswer = self.call("kv/range", &json!({ "key": encode(key) }))?;
        value(answer)
    }

    /// Puts `new` if the key holds exactly `expected`: one transaction.
    pub(super) fn swap(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        new: &[u8],
    ) -> io::Result<Swapped> {
        let key = encode(key);
        let compare = match expected {
            Some(value) => json!({
                "key": key, "target": "VALUE", "result": "EQUAL", "value": encode(value),
            }),
            None => json!({
                "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0",
            }),
        };
        let transaction = json!({
            "compare": [compare],
            "success": [{ "request_put": { "key": key, "value": encode(new) } }],
            "failure": [{ "request_range": { "key": key } }],
        });
        let answer: TxnAnswer = self.call("kv/txn", &transaction)?;
        if answer.succeeded {
            return Ok(Swapped::Yes);
        }
        let range = answer.responses.into_iter().find_map(|response| response.response_range);
        Ok(Swapped::No(value(range.ok_or_else(|| damaged("a transaction without its answer"))?)?))
    }

    /// Puts a key that etcd removes by itself after `seconds`.
    pub(super) fn put_for(&self, key: &str, value: &str, seconds: u32) -> io::Result<()> {
        let lease: LeaseAnswer =
            self.call("lease/grant", &json!({ "TTL": seconds.to_string() }))?;
        let put = json!({ "key": encode(key), "value": encode(value), "lease": lease.id });
        self.call::<Value>("kv/put", &put).map(|_| ())
    }

    /// Which cluster it belongs to. Answered by the member alone, also without a majority.
    pub(super) fn cluster(&self) -> io::Result<String> {
        let answer: AnyAnswer = self.call("cluster/member/list", &json!({}))?;
        Ok(answer.header.cluster_id)
    }

    fn call<T: DeserializeOwned>(&self, method: &str, body: &Value) -> io::Result<T> {
        let request = self
            .agent
            .post(format!("{}/{method}", self.base))
            .header("content-type", "application/json");
        let mut response = request.send(body.to_string()).map_err(into_io)?;
        let read = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec();
        let bytes = read.map_err(into_io)?;
        let status = response.status();
        if status != 200 {
            let text: Result<Value, _> = serde_json::from_slice(&bytes);
            let said = text.ok().and_then(|text| text["error"].as_str().map(str::to_owned));
            let said: String = said.unwrap_or_default().chars().take(MAX_REFUSAL_CHARS).collect();
            return Err(io::Error::other(format!("it answers {}: {said}", status.as_u16())));
        }
        serde_json::from_slice(&bytes).map_err(|error| damaged(&error.to_string()))
    }
}

fn value(answer: RangeAnswer) -> io::Result<Stored> {
    let Some(found) = answer.kvs.into_iter().next() else { return Ok(None) };
    let value = BASE64_STANDARD.decode(found.value);
    Ok(Some(value.map_err(|error| damaged(&error.to_string()))?))
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_STANDARD.encode(bytes)
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("its answer is not one of etcd's: {what}"))
}

fn into_io(error: ureq::Error) -> io::Error {
    match error {
        ureq::Error::Io(error) => error,
        ureq::Error::Timeout(_) => {
            io::Error::new(ErrorKind::TimedOut, "it has not answered in time")
        }
        error => io::Error::other(error.to_string()),
    }
}
