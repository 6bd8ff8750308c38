// The ring of the dK/dV pass: granules of queries and of dO, and the statistics of their rows.
#pragma once

#include "backward_rows.h"
#include "ring.h"

// The rows of queries that see any of a block of keys, of all heads that share it, one head after
// another.
struct QueryWalk {
  int first_head;
  int first_row;  // of each head
  int end_row;
  int granules;  // of each head
  int count;     // of all granules

  QueryWalk(int k, int heads, Range rows, int granule_rows) thread {
    first_head = k * heads;
    first_row = rows.begin / 8 * 8;
    end_row = rows.end;
    granules = rows.is_empty() ? 0 : (end_row - first_row + granule_rows - 1) / granule_rows;
    count = heads * granules;
  }
  int head(int i) const thread { return first_head + i / granules; }
  bool begins_head(int i) const thread { return i % granules == 0; }
  int row(int i, int granule_rows) const thread { return first_row + i % granules * granule_rows; }
};

template <typename M, int D>
struct QueryRing {
  using Sizes = RingSizes<M, D>;
  using Operand = Ring<M, D, Sizes::kSlots, true, false>;
  static constant constexpr int kRows = Sizes::kGranuleRows;

  struct Memory {
    typename Operand::Memory queries;
    typename Operand::Memory gradients;
    RowStatistics statistics[Sizes::kSlots * kRows];
  };
  static_assert(sizeof(Memory) <= 32768, "threadgroup memory");

  threadgroup Memory* memory;
  Operand queries;
  Operand gradients;
  RowStatistics held;
  // Of the granule that was read last.
  Rows query_rows;
  Rows gradient_rows;

  // Fills the first granule; every thread takes part.
  void start(threadgroup Memory* all, thread const Operands& operands,
             thread const Cotangents& cotangents, device const RowStatistics* statistics,
             QueryWalk walk, int b, ushort thread_index) thread {
    memory = all;
    queries.memory = &all->queries;
    gradients.memory = &all->gradients;
    if (walk.count == 0) return;
    read(operands, cotangents, statistics, walk, b, 0, thread_index);
    write(walk, 0, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the first rows are filled
  }

  // Begins what `advance` ends.
  void prefetch(thread const Operands& operands, thread const Cotangents& cotangents,
                device const RowStatistics* statistics, QueryWalk walk, int b, int i,
                ushort thread_index) thread {
    if (i + 1 < walk.count) {
      read(operands, cotangents, statistics, walk, b, i + 1, thread_index);
    }
  }

  // The simdgroup has used granule i; every thread takes part.
  void advance(QueryWalk walk, int i, ushort thread_index) const thread {
    if (i + 1 >= walk.count) return;
    if (Sizes::kSlots == 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the only rows are free
    }
    write(walk, i + 1, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next rows are filled
  }

  RowStatistics statistics_of(int i, int row) const thread {
    return memory->statistics[i % Sizes::kSlots * kRows + row];
  }

 private:
  void read(thread const Operands& operands, thread const Cotangents& cotangents,
            device const RowStatistics* statistics, QueryWalk walk, int b, int i,
            ushort thread_index) thread {
    const int n = walk.head(i), first = walk.row(i, kRows);
    if (walk.begins_head(i)) {
      query_rows = operands.query_rows(b, n);
      gradient_rows = out_gradient_rows(operands, cotangents, b, n);
    }
    const TilePart<D> part(thread_index);
    queries.read(query_rows, first, walk.end_row, part);
    gradients.read(gradient_rows, first, walk.end_row, part);
    if (thread_index < kRows && first + thread_index < walk.end_row) {
      thread const AttentionParameters& p = *operands.parameters;
      held = statistics[(Int64(b) * p.N + n) * p.T + first + thread_index];
    }
  }
  void write(QueryWalk walk, int i, ushort thread_index) const thread {
    const int first = walk.row(i, kRows);
    const TilePart<D> part(thread_index);
    queries.write(query_rows, i, first, walk.end_row, false, part, thread_index);
    gradients.write(gradient_rows, i, first, walk.end_row, false, part, thread_index);
    if (thread_index < kRows && first + thread_index < walk.end_row) {
      memory->statistics[i % Sizes::kSlots * kRows + thread_index] = held;
    }
  }
};
