// What a share of the forward pass keeps to itself, and how it works: which products are computed
// ahead, which rows are copied, where weights come from.
#pragma once

#include "tile.h"

namespace fastrnn::FASTRNN_ISA {

// With fewer rows than this in a share, x is multiplied ahead: they would not fill a tile.
constexpr int64_t kHoistShare = kHasMatrixUnit ? kTileRows : kHoistBelow;

// So it is with up to kWideShare rows if the share's weights exceed a cache: those of x are then
// read once for kWideHoist rows of several steps.
constexpr int64_t kWideHoist = 128;
constexpr int64_t kWideShare = 24;
constexpr int64_t kCachedBytes = 1 << 20;

// Of so many that are read in place, those that come next are fetched: from memory that pays, and
// from L3 it does not.
constexpr int64_t kDistantBytes = 16 << 20;

// Blocks of rows that each read a panel in place sooner than it is packed for all, where most
// columns are in spans.
constexpr int64_t kBlocksInPlace = FASTRNN_VECTOR_BYTES == 64 ? 3 : 2;

// Where w_hh is read in place, so is w_ih for so many hoisted rows, two blocks, and for as many as
// kSpansInPlace if most of it is in spans. More would read or transpose it too often.
constexpr int64_t kInputInPlace = 2 * kTileRows;
constexpr int64_t kSpansInPlace = 24;

// Where the parts of a share's scratch begin.
template <typename E>
struct ForwardScratch {
  using C = Compute<E>;

  // Weights that are not packed as a whole: few rows read them in place (rows_in_place) where their
  // own rows can be (reads_rows), and at a single step in a matrix unit, whose left factor they
  // are; else each panel is packed before it is used, at every step.
  const bool left_weights;
  const bool packs_panels;
  const int64_t hoist_rows;  // at most, of all steps together
  const bool hoist;
  // Whether a panel of w_ih is packed before hoisted x is multiplied with it.
  const bool packs_input;
  const int64_t panels_ahead;  // panels that are packed and computed together, if packs_panels
  const bool reorders;         // whether h is copied into the order of summation
  const bool fetches;          // whether the next panel is fetched into L2 while one is multiplied
  const bool fetches_rows;     // whether those are that are read in place
  // First, hoisted products or packed panels, which are never both wanted; packed_x: room for two
  // panels of w_ih, if packs_input; then:
  const int64_t packed_x, staged_x, staged_h, staged_m, end;

  FASTRNN_INLINE explicit ForwardScratch(const ForwardSizes& sizes)
      : left_weights(kHasMatrixUnit && !sizes.packed_hh && sizes.steps == 1 &&
                     sizes.share_rows <= kTileRows),
        packs_panels(!sizes.packed_hh && !left_weights &&
                     (!reads_rows<E>(sizes.input) || !reads_rows<E>(sizes.width) ||
                      sizes.share_rows > rows_in_place(sizes))),
        hoist_rows(packs_panels ? 0 : most_hoisted(sizes)),
        hoist(hoist_rows > 0),
        packs_input(!sizes.packed_ih &&
                    (sizes.packed_hh ||
                     hoist_rows > (mostly_spans(sizes.input) ? kSpansInPlace : kInputInPlace))),
        panels_ahead(packs_panels && sizes.share_rows <= kTwoPanelRows ? 2 : 1),
        // Few rows that meet many weights: the operands of a span, read from where they lie, would
        // be fetched from L2 again for each of its blocks.
        reorders(kIsOperand<E> && sizes.packed_hh && hoist && sizes.share_rows < kHoistShare &&
                 sizes.width >= kSpan),
        fetches(2 * weight_bytes(sizes) > kCachedBytes),
        fetches_rows(!sizes.packed_hh && weight_bytes(sizes) >= kDistantBytes),
        packed_x(packs_panels ? panels_ahead * panel_size(sizes)
                              : hoist_rows * sizes.share_panels * kPanelColumns<C>),
        staged_x(packed_x + (packs_input ? 2 * operands<E>(sizes.input) * kPanelColumns<C> : 0)),
        staged_h(staged_x + staged(sizes.input, hoist ? hoist_rows : sizes.share_rows)),
        staged_m(staged_h + (reorders ? sizes.share_rows * sizes.width
                                      : staged(sizes.width, sizes.share_rows))),
        end(staged_m + (sizes.projected ? staged(sizes.hidden, sizes.share_rows) : 0)) {}

  // Rows whose x is multiplied ahead; 0: none. One row a step leaves L2 to the recurrent weights:
  // half as many products then disturb it less.
  static FASTRNN_INLINE int64_t most_hoisted(const ForwardSizes& sizes) {
    if (!sizes.packed_hh && sizes.steps == 1) return 0;
    int64_t most = sizes.share_rows == 1 ? kHoistRows / 2 : kHoistRows;
    if (sizes.packed_hh && !sizes.packed_ih) {
      most = kMostHoisted;
    } else if (sizes.share_rows >= kHoistShare) {
      const bool pays = weight_bytes(sizes) > kCachedBytes && sizes.share_rows <= kWideShare;
      if (!pays || sizes.steps == 1) return 0;
      most = kWideHoist;
    }
    return smaller(sizes.share_rows * sizes.steps, most);
  }
  static FASTRNN_INLINE bool mostly_spans(int64_t k, int64_t more = 0) {
    const int64_t x = operands<E>(k), h = operands<E>(more);
    return 2 * (whole_spans(x) + whole_spans(h)) >= x + h;
  }
  // Of more than one step, that few are a block at most (packs_weights of ../forward_plan.h).
  static FASTRNN_INLINE int64_t rows_in_place(const ForwardSizes& sizes) {
    return (mostly_spans(sizes.input, sizes.width) ? kBlocksInPlace : 1) * kTileRows;
  }
  // Where elements are not operands, rows are converted before they are read by every tile.
  static FASTRNN_INLINE int64_t staged(int64_t k, int64_t rows) {
    return kIsOperand<E> ? 0 : rows * operands<E>(k);
  }
  static FASTRNN_INLINE int64_t weight_bytes(const ForwardSizes& sizes) {
    return panel_size(sizes) * sizes.share_panels * int64_t{sizeof(C)};
  }
  static FASTRNN_INLINE int64_t panel_size(const ForwardSizes& sizes) {
    return (operands<E>(sizes.input) + operands<E>(sizes.width)) * kPanelColumns<C>;
  }
};

}  // namespace fastrnn::FASTRNN_ISA
