// The emulator's cooperative_groups.h: the barriers of the grid and of a cluster.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

class grid_group {
 public:
  void sync(fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) const {
    fastrnn_emulator::sync_grid(where);
  }
};

class cluster_group {
 public:
  void sync(fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) const {
    fastrnn_emulator::sync_cluster(where);
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
