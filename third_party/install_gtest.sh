#!/bin/sh
# GoogleTest comes from the system's packages: installed here when we may, asked for otherwise. Never skipped.
set -eu
for prefix in /usr /usr/local "${CONDA_PREFIX:-/usr}" "${GTest_ROOT:-/usr}"; do
    if [ -e "$prefix/include/gtest/gtest.h" ]; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq libgtest-dev >/dev/null
    exit 0
fi
echo "error: GoogleTest is not installed. Install it (Debian/Ubuntu: sudo apt-get install libgtest-dev;" \
     "Fedora: sudo dnf install gtest-devel) or set GTest_ROOT." >&2
exit 1
