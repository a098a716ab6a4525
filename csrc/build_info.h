// How this library was built, as JSON; setup.py passes it in, and mlhead/_extension.py reads it through ctypes.
#pragma once

#ifndef MLHEAD_BUILD_INFO
#define MLHEAD_BUILD_INFO "{}"
#endif

#define MLHEAD_EXPORT extern "C" __attribute__((visibility("default")))
