// What the kernels compute, as plain loops over double.
#pragma once

#include <vector>

#include "arrays.h"

namespace fastrnn::sanitize {

struct Shape {
  Cell cell;
  bool reverse, projected;
  int64_t T, N, I, H, P;
  std::vector<int64_t> sizes, offsets;  // of a packed sequence, else empty

  Schedule schedule() const {
    const bool packed = !sizes.empty();
    return {T, N, packed ? sizes.data() : nullptr, packed ? offsets.data() : nullptr};
  }
  int64_t gates() const { return gate_count(cell) * H; }
  int64_t rows() const { return sizes.empty() ? T * N : offsets.back() + sizes.back(); }
  int64_t time(int64_t s) const { return reverse ? T - 1 - s : s; }  // of forward step s
};

// A matrix of doubles.
struct Matrix {
  int64_t columns = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t rows, int64_t columns) : columns(columns), data(rows * columns) {}
  template <typename E>
  Matrix(const E* values, int64_t rows, int64_t columns) : Matrix(rows, columns) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = to_double(values[i]);
  }
  double* operator[](int64_t row) { return data.data() + row * columns; }
  const double* operator[](int64_t row) const { return data.data() + row * columns; }
};

// out += w . x, w (rows, columns).
inline void add_product(const Matrix& w, const double* x, double* out) {
  for (int64_t j = 0; j < static_cast<int64_t>(w.data.size()) / w.columns; ++j) {
    for (int64_t k = 0; k < w.columns; ++k) out[j] += w[j][k] * x[k];
  }
}

// out += x . w
inline void add_transposed(const Matrix& w, const double* x, double* out) {
  for (int64_t j = 0; j < static_cast<int64_t>(w.data.size()) / w.columns; ++j) {
    for (int64_t k = 0; k < w.columns; ++k) out[k] += w[j][k] * x[j];
  }
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Inputs and results of one direction, a row for each row of each step or of the batch. h0 and c0
// become the final states.
struct NaiveForward {
  Matrix x, w_ih, w_hh, w_hr, h0, c0;
  std::vector<double> bias;
  Matrix h, gates, c_all, unprojected;
};

template <typename E>
void run_naive_forward(const Shape& shape, NaiveForward& run) {
  const int64_t H = shape.H;
  const Schedule schedule = shape.schedule();
  run.h = Matrix(shape.rows(), shape.P);
  run.gates = Matrix(shape.rows(), 4 * H);
  run.c_all = Matrix(shape.rows(), H);
  run.unprojected = Matrix(shape.rows(), H);
  for (int64_t s = 0; s < shape.T; ++s) {
    const int64_t t = shape.time(s);
    for (int64_t n = 0; n < schedule.rows_at(t); ++n) {
      const int64_t row = schedule.offset(t) + n;
      std::vector<double> pre = run.bias, m(H), projected(shape.P);
      add_product(run.w_ih, run.x[row], pre.data());
      add_product(run.w_hh, run.h0[n], pre.data());
      for (int64_t u = 0; u < H; ++u) {
        if (shape.cell != Cell::lstm) {
          m[u] = shape.cell == Cell::rnn_tanh ? std::tanh(pre[u]) : std::max(pre[u], 0.);
          continue;
        }
        double* gate = run.gates[row] + u;  // H apart
        gate[0] = sigmoid(pre[u]);
        gate[H] = sigmoid(pre[H + u]);
        gate[2 * H] = std::tanh(pre[2 * H + u]);
        gate[3 * H] = sigmoid(pre[3 * H + u]);
        double& c = run.c0[n][u];
        c = gate[H] * c + gate[0] * gate[2 * H];
        run.c_all[row][u] = c;
        m[u] = gate[3 * H] * std::tanh(c);
      }
      for (double& value : m) value = rounded<E>(value);
      std::copy(m.begin(), m.end(), run.unprojected[row]);
      if (shape.projected) {
        add_product(run.w_hr, m.data(), projected.data());
      } else {
        projected = m;
      }
      for (int64_t j = 0; j < shape.P; ++j) run.h[row][j] = run.h0[n][j] = rounded<E>(projected[j]);
    }
  }
}

// As NaiveForward. h, gates, c_all and unprojected are what the kernel left, h0 and c0 the initial
// states; dh and dc those of the final states on entry, of the initial ones on return.
struct NaiveBackward {
  Matrix x, w_ih, w_hh, w_hr, h0, c0, h, gates, c_all, unprojected, dy, dh, dc;
  Matrix dx, dw_ih, dw_hh, dw_hr, db;
};

// Rounds: what the kernels round gradients of pre-activations to.
template <typename Rounds>
void run_naive_backward(const Shape& shape, NaiveBackward& run) {
  const int64_t H = shape.H, G = shape.gates(), P = shape.P;
  const Schedule schedule = shape.schedule();
  for (int64_t s = shape.T - 1; s >= 0; --s) {
    const int64_t t = shape.time(s), previous = s > 0 ? shape.time(s - 1) : -1;
    for (int64_t n = 0; n < schedule.rows_at(t); ++n) {
      const int64_t row = schedule.offset(t) + n;
      const bool continues = previous >= 0 && n < schedule.rows_at(previous);
      const int64_t before = continues ? schedule.offset(previous) + n : 0;
      std::vector<double> dh(run.dh[n], run.dh[n] + P), dm(H), dgates(G);
      for (int64_t j = 0; j < P; ++j) dh[j] += run.dy[row][j];
      if (shape.projected) {
        for (double& value : dh) value = rounded<Rounds>(value);
        add_transposed(run.w_hr, dh.data(), dm.data());
        for (int64_t j = 0; j < P; ++j) {
          for (int64_t u = 0; u < H; ++u) run.dw_hr[j][u] += dh[j] * run.unprojected[row][u];
        }
      } else {
        dm = dh;
      }
      for (int64_t u = 0; u < H; ++u) {
        if (shape.cell != Cell::lstm) {
          const double h = run.h[row][u];
          dgates[u] = shape.cell == Cell::rnn_tanh ? dm[u] * (1 - h * h) : (h > 0 ? dm[u] : 0);
          continue;
        }
        const double* gate = run.gates[row] + u;
        const double i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H];
        const double tanh_c = std::tanh(run.c_all[row][u]);
        const double c_before = continues ? run.c_all[before][u] : run.c0[n][u];
        const double d = run.dc[n][u] + dm[u] * o * (1 - tanh_c * tanh_c);
        dgates[u] = d * g * i * (1 - i);
        dgates[H + u] = d * c_before * f * (1 - f);
        dgates[2 * H + u] = d * i * (1 - g * g);
        dgates[3 * H + u] = dm[u] * tanh_c * o * (1 - o);
        run.dc[n][u] = d * f;
      }
      for (double& value : dgates) value = rounded<Rounds>(value);
      std::fill_n(run.dh[n], P, 0.);
      add_transposed(run.w_hh, dgates.data(), run.dh[n]);
      add_transposed(run.w_ih, dgates.data(), run.dx[row]);
      const double* h_before = continues ? run.h[before] : run.h0[n];
      for (int64_t j = 0; j < G; ++j) {
        run.db[0][j] += dgates[j];
        for (int64_t k = 0; k < shape.I; ++k) run.dw_ih[j][k] += dgates[j] * run.x[row][k];
        for (int64_t k = 0; k < P; ++k) run.dw_hh[j][k] += dgates[j] * h_before[k];
      }
    }
  }
}

}  // namespace fastrnn::sanitize
