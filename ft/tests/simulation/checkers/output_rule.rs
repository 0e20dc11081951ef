//! No output is released before the backup has its record in its hands.

use std::collections::BTreeMap;

use super::Verdict;
use crate::network::End;
use crate::node::Tagged;

#[derive(Default)]
pub struct OutputRule {
    /// By process: what it has of the log it was sent. A generation can see several copies begun.
    received: BTreeMap<(usize, u32), u64>,
}

impl OutputRule {
    pub fn received(&mut self, backup: End, position: u64) {
        self.received.insert((backup.node, backup.life), position);
    }

    pub fn released(&self, backup: Option<End>, tagged: &Tagged) -> Verdict {
        let key = backup.map(|end| (end.node, end.life));
        let received = key.and_then(|key| self.received.get(&key)).copied().unwrap_or(0);
        match tagged.position {
            Some(position) if position > received => Err(format!(
                "output {} needs log position {position}, the backup has {received}",
                tagged.number
            )),
            _ => Ok(()),
        }
    }
}
