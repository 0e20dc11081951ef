//! `dyad`: one process, one virtual machine.

fn main() {}
