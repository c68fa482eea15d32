// The emulator's cooperative_groups.h: the barrier of the grid.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

class grid_group {
 public:
  void sync(fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) const {
    fastrnn_emulator::sync_grid(where);
  }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
