#include "common.h"

void bind_roi_align(py::module_& m) { (void)m; }
