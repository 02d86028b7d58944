#!/usr/bin/env bash
# Installs this checkout as the systemd service `headwater`, on Debian or what descends from it. Run it again from a
# newer checkout to upgrade: settings and data stay as they are.
#
#     sudo scripts/install-systemd.sh                install or upgrade, and start
#     sudo scripts/install-systemd.sh --uninstall    stop and remove the program; settings and data stay
#     scripts/install-systemd.sh --dry-run           print what would be run, as anybody; also with --uninstall
#
#     /opt/headwater/venv                      the program
#     /etc/headwater/headwater.toml            its settings
#     /etc/headwater/environment               API keys, NAME=value, for root's eyes only
#     /var/lib/headwater                       its database
#     /etc/systemd/system/headwater.service    the unit
set -euo pipefail

# The system's Python, not one from somebody's home, which the service could not read.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# What is installed is for the service's user to read, whatever root's habits are.
umask 022

NAME=headwater
PROGRAM=/opt/headwater
VENV=$PROGRAM/venv
SETTINGS=/etc/headwater
CONFIG=$SETTINGS/headwater.toml
ENVIRONMENT=$SETTINGS/environment
STATE=/var/lib/headwater
UNIT=/etc/systemd/system/$NAME.service

is_dry=
is_uninstall=
build=

say() { printf '%s: %s\n' "$NAME" "$*"; }

fail() {
    printf '%s: %s\n' "$NAME" "$*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

# Every command that changes something goes through here, so that a dry run prints exactly what a real one does.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    if [[ -z $is_dry ]]; then
        "$@"
    fi
}

# shellcheck disable=SC2329  # called by the trap
clean_up() {
    if [[ -n $build ]]; then
        rm -rf "$build"
    fi
}
trap clean_up EXIT

# Prints the first Python that will do: 3.11 or newer, able to make environments, and outside the homes.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.14 python3.13 python3.12; do
        if "$candidate" - 2>/dev/null <<'PY'; then
import sys, ensurepip, venv
is_in_a_home = sys.base_prefix.startswith(("/root/", "/home/"))
sys.exit(sys.version_info < (3, 11) or is_in_a_home)
PY
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Whether the environment is there and still works: it does not when the system's Python was replaced by a newer one.
venv_works() {
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

install_all() {
    local python copy
    [[ -n $is_dry ]] || command -v systemctl >/dev/null || fail "systemctl is needed, and systemd with it"
    python=$(find_python) || fail "Python 3.11 or newer with venv is needed: apt-get install python3 python3-venv"
    say "using $python ($("$python" --version))"

    if ! getent passwd "$NAME" >/dev/null; then
        run useradd --system --user-group --home-dir "$STATE" --no-create-home --shell /usr/sbin/nologin "$NAME"
    fi

    run install -d -m 0755 "$PROGRAM"
    if ! venv_works; then
        run "$python" -m venv --clear "$VENV"
    fi
    run "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --require-hashes --requirement config/lock/run.txt
    # Built from a copy: a build leaves files behind, and would take up those of an earlier one.
    if [[ -z $is_dry ]]; then
        build=$(mktemp -d)
    fi
    copy=${build:-/tmp/tmp.XXXXXXXXXX}
    run cp -r --parents README.md pyproject.toml setup.cfg proxy scripts/demo_upstream.py "$copy"
    run "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --no-deps --force-reinstall "$copy"
    # What cannot even say its version must not take the place of one that runs.
    run "$VENV/bin/headwater" --version

    run install -d -m 0755 "$SETTINGS"
    if [[ -e $CONFIG ]]; then
        say "$CONFIG is there already and stays as it is"
    else
        run install -m 0640 -g "$NAME" config/headwater.toml "$CONFIG"
    fi
    if [[ -e $ENVIRONMENT ]]; then
        say "$ENVIRONMENT is there already and stays as it is"
    else
        run install -m 0600 /dev/stdin "$ENVIRONMENT" <<'TXT'
# What Headwater finds in its environment, one NAME=value a line: API keys, and settings such as
# HEADWATER_STREAMING__HEARTBEAT_INTERVAL_S=20. To take effect: systemctl restart headwater
#OPENAI_API_KEY=
TXT
    fi

    run install -m 0644 scripts/headwater.service "$UNIT"
    run systemctl daemon-reload
    run systemctl enable "$NAME.service"
    # Starts it, or puts the new version in the old one's place when running answers have ended (30 s at most).
    if ! run systemctl restart "$NAME.service"; then
        fail "it did not start; what it says: journalctl -u $NAME -n 20"
    fi

    if [[ -n $is_dry ]]; then
        say "this was a dry run: nothing was changed"
        return
    fi
    cat <<TXT

Headwater runs, as user $NAME, and will at every boot.

  settings    $CONFIG
  API keys    $ENVIRONMENT
  data        $STATE
  then        systemctl restart $NAME

  what it does    systemctl status $NAME
  its logs        journalctl -u $NAME -f
  is it well      curl http://127.0.0.1:8100/health
  remove it       $PWD/scripts/install-systemd.sh --uninstall

With no upstream in the settings, no API key and no model server on this machine, it stands before a demo.
TXT
}

uninstall() {
    if [[ -e $UNIT || -n $is_dry ]]; then
        run systemctl disable --now "$NAME.service"
        run rm -f "$UNIT"
        run systemctl daemon-reload
    fi
    run rm -rf "$PROGRAM"
    say "left as they are: $SETTINGS, $STATE, the user $NAME, and what you added with 'systemctl edit'"
    say "to remove those too: rm -r $SETTINGS $STATE; userdel $NAME"
}

for option in "$@"; do
    case $option in
        --dry-run) is_dry=yes ;;
        --uninstall) is_uninstall=yes ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail "unknown option $option; there are --dry-run, --uninstall, --help" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n $is_dry || $EUID == 0 ]] || fail "must be run as root (or with --dry-run)"
if [[ -n $is_uninstall ]]; then
    uninstall
else
    install_all
fi
