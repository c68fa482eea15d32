// How far apart the cores of a team lie. What one writes reaches another in some 50 ns if they
// share a cache, and takes five times as long if they do not; and a system may move a thread to
// another core, the host of a virtual machine all of them, at any time. So teams time their
// barriers now and then.
#pragma once

#include <chrono>
#include <optional>

#include "barrier.h"

namespace fastrnn {

// Whether the cores of the last team that was timed, of whatever size, lay far apart. Not for long:
// calls that take one thread because of that time nothing, so that they would never learn more.
bool cores_distant();

// Whether the last team to be timed found them so, if that was lately.
std::optional<bool> measured_distant();

// Tests have calls take cores as distant, or not. Nothing: as they are.
void assume_distant(std::optional<bool> value);

// Whether a team that is called now is to time its barriers.
bool distance_wanted(std::chrono::steady_clock::time_point now);

// Times them, on all members of a team.
void measure_distance(const Member& member);

}  // namespace fastrnn
