# Sourced by the scripts that run a program on a pair, in the project's folder.

# pair_program NAME ARGUMENT...: becomes the program, after installing what the machine lacks and building what is not up
# to date. The programs build the test guest themselves.
pair_program() {
    scripts/setup --check >/dev/null 2>&1 || scripts/setup
    cargo build --quiet --release --locked --package dyad --package pair-tests
    exec "${CARGO_TARGET_DIR:-target}/release/$1" "${@:2}"
}
