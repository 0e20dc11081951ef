# Sourced by the scripts that build guests: Debian packages from the machine's own apt sources.
# The caller defines say and die.

# download_packages DIRECTORY LIST: replaces the packages in DIRECTORY by those that the command LIST names. Lists of apt
# that are older than what is installed, or than what the mirror still has, are renewed once, which takes root.
# All or nothing: what was there stays if the download fails.
download_packages() {
    local directory=$1 list=$2 fresh as=() names attempt
    if [ "$(id -u)" = 0 ]; then as=(-o APT::Sandbox::User=root); fi
    fresh=$(mktemp -d "$directory.XXXXXX")
    for attempt in 1 2; do
        if names=$($list) && [ -n "$names" ]; then
            say "downloading $(wc -w <<<"$names") packages"
            if (cd "$fresh" && apt-get "${as[@]}" -q download $names >log 2>&1); then
                mkdir -p "$directory"
                rm -f "$directory"/*
                mv "$fresh"/*.deb "$directory/"
                rm -r "$fresh"
                return
            fi
        else
            echo "apt does not offer all that is needed" >"$fresh/log"
        fi
        if [ "$attempt" = 1 ] && [ "$(id -u)" = 0 ]; then
            say "apt's lists are old or empty: apt-get update"
            apt-get update -qq || break
        fi
    done
    cat "$fresh/log" >&2
    rm -r "$fresh"
    die "the download failed (it needs Debian's package sources; as root: apt-get update)"
}
