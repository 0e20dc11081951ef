//! Debian's own programs in the guest: they run, and a failover is nothing to them.

use anyhow::{Result, ensure};
use pair_tests::lab::Lab;
use pair_tests::pair::Pair;
use pair_tests::requirements::{Need, met};
use std::time::Duration;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
/// What one command in the guest may take.
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn programs_start_from_the_root_file_system_and_go_down_with_the_guest() -> Result<()> {
    if !met("root file system with programs", &NEEDS) {
        return Ok(());
    }
    let start = "dyad.start=\"redis nginx sqlite streams\"";
    let mut pair = Pair::boot_with(Lab::with_programs()?, start)?;
    let mut said = |command: &str| pair.primary.console.run(command, PATIENCE);
    let redis = said("redis-cli incr counter")?;
    ensure!(redis == "(integer) 1", "{redis}");
    let nginx = said("wget -qO- http://127.0.0.1/small | head -n 2")?;
    ensure!(nginx == "1\n2", "{nginx}");
    let sqlite = "echo 'create table t(n); insert into t values(42); select n from t;' | \
                  socat -t 10 - TCP:127.0.0.1:7100";
    let sqlite = said(sqlite)?;
    ensure!(sqlite == "42", "{sqlite}");
    let compiled = said("compile")?;
    ensure!(compiled == "program: right", "{compiled}");
    let stress = said("stress-ng --cpu 1 --cpu-ops 5 --verify 2>&1 | tail -n 1")?;
    ensure!(stress.contains("successful run completed"), "{stress}");
    // Every service holds files on /data; it is unmounted all the same.
    pair.power_off()?;
    Ok(())
}
