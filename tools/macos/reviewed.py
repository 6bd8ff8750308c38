"""What no binary, header or metadata at hand proves, each with the reason why it is let through.

The gate refuses entries that it does not need, so these lists do not outlive their reasons.
"""

_ARC = "libobjc", "in clang's specification of ARC; clang calls it where the minimum OS has it"
_METAL = "Metal", "of macOS 10.11 in Apple's documentation; mlx-metal, for macOS 14, imports it"
_METAL_CLASS = "Metal", "a class of metal-cpp, of macOS 10.11 or 10.12 in Apple's documentation"
_STREAMS = "libc++", "libc++'s headers say LLVM 12, macOS 12.3: __configuration/availability.h"

# Imported symbols that no binary at hand imports while it asks for at most our minimum OS: library
# and reason.
IMPORTS: dict[str, tuple[str, str]] = {
    "_MTLCopyAllDevices": _METAL,
    "_MTLCreateSystemDefaultDevice": _METAL,
    "_OBJC_CLASS_$_MTLBinaryArchiveDescriptor": (
        "Metal",
        "a class of metal-cpp, of macOS 11.0 in Apple's documentation",
    ),
    "_OBJC_CLASS_$_MTLCompileOptions": _METAL_CLASS,
    "_OBJC_CLASS_$_MTLComputePipelineDescriptor": _METAL_CLASS,
    "_OBJC_CLASS_$_MTLFunctionConstantValues": _METAL_CLASS,
    "_OBJC_CLASS_$_NSFileManager": ("Foundation", "a class of Foundation's since Mac OS X 10.0"),
    "__ZNKSt3__115basic_stringbufIcNS_11char_traitsIcEENS_9allocatorIcEEE3strEv": _STREAMS,
    "__ZTTNSt3__118basic_stringstreamIcNS_11char_traitsIcEENS_9allocatorIcEEEE": _STREAMS,
    "__ZTVNSt3__115basic_stringbufIcNS_11char_traitsIcEENS_9allocatorIcEEEE": _STREAMS,
    "__ZTVNSt3__118basic_stringstreamIcNS_11char_traitsIcEENS_9allocatorIcEEEE": _STREAMS,
    "__ZdlPvm": ("libc++", "clang's table says macOS 10.12: clang/Basic/SizedDeallocation.h"),
    "__availability_version_check": (
        "libSystem",
        "PyObjC imports it weakly; compiler-rt's os_version_check.c says macOS 10.15",
    ),
    "_objc_alloc_init": _ARC,
    "_objc_autoreleaseReturnValue": _ARC,
    "_objc_retainAutorelease": _ARC,
    "_objc_retainAutoreleasedReturnValue": _ARC,
}

# Enumerators of which one source says something else: our value and the reason.
ENUMERATORS: dict[str, tuple[int, str]] = {
    "MTLResourceStorageModeMemoryless": (
        48,
        "MTLStorageModeMemoryless (3) shifted by 4, and so in PyObjC; metal-cpp has 32",
    ),
}

_STRING = "PyObjC's metadata has the argument, and leaves out the result"

# Messages whose types no source at hand gives in full.
MESSAGES: dict[str, str] = {
    "+[NSFileManager defaultManager]": "takes nothing and gives an object",
    "-[NSFileManager createDirectoryAtPath:withIntermediateDirectories:attributes:error:]": (
        "PyObjC's metadata has both BOOLs and the error, and leaves out what are objects"
    ),
    "-[NSArray containsObject:]": "takes an object and gives a BOOL",
    "+[NSString stringWithFormat:]": _STRING,
    "+[NSString stringWithUTF8String:]": _STRING,
    "-[NSString stringByAppendingPathComponent:]": "takes a string and gives one",
    "-[NSURL path]": "takes nothing and gives a string",
}
