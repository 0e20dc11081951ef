//! A backup whose memory was changed behind its back: it is found, thrown away and made anew, and nobody
//! notices.

use anyhow::{Context, Result, bail, ensure};
use ledger_client::load::{Load, Options};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const PAGE_BYTES: usize = 4096;
/// Size of the guest's memory, which lies in one piece below the 32-bit hole.
const MEMORY_BYTES: u64 = 256 << 20;
/// What the firmware's tables begin with, and where they are in the guest's memory.
const RSDP: &[u8; 8] = b"RSD PTR ";
const RSDP_ADDRESS: u64 = 0xe_0000;
/// What fills the page that the guest keeps writing, but for its first bytes.
const FILL: u8 = b'Q';
/// Where the guest writes no more.
const QUIET: usize = 64;

/// The guest's memory from outside, as a cosmic ray sees it.
struct GuestRam {
    memory: File,
    start: u64,
}

impl GuestRam {
    /// Finds it in the process `pid`.
    fn of(pid: u32) -> Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let path = format!("/proc/{pid}/mem");
        let memory = File::options().read(true).write(true).open(&path).context(path)?;
        // The kernel may show it as one with a neighbour, before it or behind it.
        let candidates = maps.lines().filter_map(|line| {
            let (start, rest) = line.split_once('-')?;
            let (end, rest) = rest.split_once(' ')?;
            let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).ok());
            let (start, end) = (start?, end?);
            let large = end - start >= MEMORY_BYTES && rest.starts_with("rw-p");
            large.then_some([start, end.saturating_sub(MEMORY_BYTES)])
        });
        let mut signature = [0; RSDP.len()];
        let start = candidates
            .flatten()
            .find(|start| {
                let read = memory.read_exact_at(&mut signature, start + RSDP_ADDRESS);
                read.is_ok() && signature == *RSDP
            })
            .with_context(|| format!("no guest memory in:\n{maps}"))?;
        Ok(Self { memory, start })
    }

    fn page(&self, number: u64) -> Result<Vec<u8>> {
        let mut page = vec![0; PAGE_BYTES];
        self.memory.read_exact_at(&mut page, self.start + number * PAGE_BYTES as u64)?;
        Ok(page)
    }

    /// Pages that are filled as the test's file is, and their first bytes.
    fn filled(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut found = Vec::new();
        for number in 0..MEMORY_BYTES / PAGE_BYTES as u64 {
            let page = self.page(number)?;
            if page[QUIET..].iter().all(|byte| *byte == FILL) {
                found.push((number, page[..QUIET].to_vec()));
            }
        }
        Ok(found)
    }

    /// A page that the guest keeps writing, and where it never changes.
    fn busy_page(&self) -> Result<u64> {
        let first = self.filled()?;
        eventually(PATIENCE, "a page changes", || {
            for (number, before) in &first {
                let page = self.page(*number)?;
                let quiet = page[QUIET..].iter().all(|byte| *byte == FILL);
                if quiet && page[..QUIET] != before[..] {
                    return Ok(Some(*number));
                }
            }
            Ok(None)
        })
    }

    fn flip_bit(&self, number: u64) -> Result<()> {
        let at = self.start + number * PAGE_BYTES as u64 + 2000;
        let mut byte = [0];
        self.memory.read_exact_at(&mut byte, at)?;
        if byte != [FILL] {
            bail!("page {number:#x} has changed");
        }
        Ok(self.memory.write_all_at(&[FILL ^ 1], at)?)
    }
}

#[test]
fn a_flipped_bit_is_found_and_the_backup_made_anew() -> Result<()> {
    if !met("a flipped bit in the backup's memory", &[Need::Root, Need::Tap]) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "flip"))?;
    flip(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn flip(pair: &mut Pair, load: &Load) -> Result<()> {
    let file = "head -c 4096 /dev/zero | tr '\\0' Q >/page";
    let write = "cat /proc/uptime | dd of=/page bs=32 count=1 conv=notrunc 2>/dev/null";
    let command = format!("{file}; (while :; do {write}; usleep 20000; done) & true");
    pair.primary.console.run(&command, PATIENCE)?;
    pair.protect()?;
    progress(load, 20)?;
    let backup = pair.backup.as_ref().context("there is a backup")?;
    let ram = GuestRam::of(backup.pid())?;
    let page = ram.busy_page()?;
    ram.flip_bit(page)?;

    let status = wait_for_status(&pair.primary, "the difference is found", |status| {
        status.last_unequal.is_some()
    })?;
    let unequal = status.last_unequal.context("just seen")?;
    ensure!(unequal.to_string() == format!("memory (page {page:#x})"), "{unequal:?}");
    wait_for_status(&pair.primary, "a fresh copy protects", |status| {
        status.role == "primary" && status.state == "protected"
    })?;
    progress(load, 20)?;
    let compared = pair.status()?.digests_compared;
    eventually(CHANGE, "digests are equal again", || {
        let status = pair.status()?;
        ensure!(status.state == "protected", "{status:?}");
        Ok((status.digests_compared > compared).then_some(()))
    })
}
