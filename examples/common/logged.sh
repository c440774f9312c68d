# shellcheck shell=bash
# logged LOG COMMAND...: run a command, show what it prints and add it to LOG, and return its exit code. A signal to the
# script is passed on to the command, which may still save: the script waits for it, and shows all that it says.
logged() {
    local log="$1" shown running="" early="" code=0 signalled=1
    shift
    mkdir -p "$(dirname "$log")"
    # Before the command starts: it may work before the next line of this script is read.
    trap 'signalled=1 && pass_on TERM' INT TERM # commands in the background ignore Ctrl-C until they ask for it
    trap 'signalled=1 && pass_on HUP' HUP
    trap 'signalled=1 && pass_on USR1' USR1
    trap 'signalled=1 && pass_on USR2' USR2
    # tee ends when the command does, and at no signal: a console that broke at Ctrl-C would lose the last lines.
    exec 3> >(trap '' INT TERM HUP USR1 USR2 && exec tee -a "$log")
    shown=$!
    "$@" >&3 2>&1 3>&- &
    running=$!
    exec 3>&-
    [[ -z "$early" ]] || pass_on "$early"
    while ((signalled)); do # a signal interrupts the wait
        signalled=0
        wait "$running" && code=0 || code=$?
    done
    trap - INT TERM HUP USR1 USR2
    wait "$shown" || true
    return "$code"
}
pass_on() {
    if [[ -z "$running" ]]; then
        early="$1"
    else
        kill -"$1" "$running" 2> /dev/null || true # it may have ended
    fi
}
