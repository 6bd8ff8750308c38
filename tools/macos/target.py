"""What the wheel is built for, and with what; wheel.sh and toolchain.cmake say the same."""

MINIMUM_OS = (13, 0)
TRIPLE = "arm64-apple-macos{}.{}".format(*MINIMUM_OS)
LLVM = "22"
